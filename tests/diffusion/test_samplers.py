"""Samplers, on data whose best denoiser is known: every pixel normal of mean m and deviation s."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor

from dgm.diffusion.parameterization import Denoised
from dgm.diffusion.samplers import Denoiser, SamplerName, run_sampler
from dgm.diffusion.schedule import Schedule, make_schedule
from dgm.rng import Draws

NAMES = get_args(SamplerName)
MEAN, DEVIATION = 0.3, 0.5


def gaussian(schedule: Schedule) -> Denoiser:
    """Return the denoiser E[x_0 | x_t], which is linear in x_t."""

    def denoise(x: Tensor, t: int) -> Denoised:
        alpha, sigma = schedule.alphas[t], schedule.sigmas[t]
        gain = alpha * DEVIATION**2 / (alpha**2 * DEVIATION**2 + sigma**2)
        x_0 = MEAN + gain * (x - alpha * MEAN)
        return Denoised(x_0, (x - alpha * x_0) / sigma)

    return denoise


def latent(count: int, size: int = 4) -> tuple[Tensor, Draws]:
    draws = Draws.of(0, torch.arange(count))
    return draws.normal("latent", (size, size, 1), torch.float64).permute(0, 3, 1, 2), draws


def ode_error(name: SamplerName, schedule: Schedule, steps: int) -> float:
    """Return the mean distance to the probability-flow ODE's solution.

    The ODE keeps each pixel's quantile, (x_t - alpha m) / sqrt(alpha^2 s^2 + sigma^2).
    """
    x, draws = latent(16)
    alpha, sigma = schedule.alphas[-1], schedule.sigmas[-1]
    quantile = (x - alpha * MEAN) / (alpha**2 * DEVIATION**2 + sigma**2).sqrt()
    made = run_sampler(name, gaussian(schedule), x, schedule, draws, steps)
    return float((made - (MEAN + DEVIATION * quantile)).abs().mean())


@pytest.mark.parametrize(
    "name, kind, zero_terminal_snr",
    [
        ("dpmpp_2m", "linear", False),
        ("dpmpp_2m", "cosine", False),
        ("dpmpp_2m", "cosine", True),
        ("heun", "linear", False),
        ("heun", "cosine", True),
        ("heun", "cosine", False),
    ],
)
@pytest.mark.parametrize("steps", [10, 20, 50])
def test_second_order_samplers_beat_ddim_at_equal_steps(
    name: SamplerName, kind: str, zero_terminal_snr: bool, steps: int
):
    schedule = make_schedule(kind, 1000, zero_terminal_snr)
    assert ode_error(name, schedule, steps) < 0.8 * ode_error("ddim", schedule, steps)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_a_denoiser_of_one_image_samples_it(name: SamplerName, steps: int, zero_terminal_snr: bool):
    schedule = make_schedule("linear", 50, zero_terminal_snr)
    x, draws = latent(4)
    image = x.flip(0).clamp(-1, 1)

    def denoise(x_t: Tensor, t: int) -> Denoised:
        return Denoised(image, (x_t - schedule.alphas[t] * image) / schedule.sigmas[t])

    made = run_sampler(name, denoise, x, schedule, draws, steps)
    torch.testing.assert_close(made, image, rtol=0, atol=1e-10)  # float64, alpha of 0.006


@pytest.mark.parametrize("fraction, as_named", [(0.0, "small"), (1.0, "large")])
def test_learned_variance_runs_from_small_to_large(fraction: float, as_named: str):
    schedule = make_schedule("linear", 50)
    (x, draws), plain = latent(8), gaussian(schedule)

    def denoise(x_t: Tensor, t: int) -> Denoised:
        return plain(x_t, t)._replace(variance_fraction=torch.full_like(x_t, fraction))

    learned = run_sampler("ddpm", denoise, x, schedule, draws, 20, variance="learned")
    named = run_sampler("ddpm", plain, x, schedule, draws, 20, variance=as_named)
    torch.testing.assert_close(learned, named, rtol=0, atol=1e-10)  # rounding of float64


@pytest.mark.parametrize("name", NAMES)
def test_only_ancestral_sampling_draws_noise(name: SamplerName):
    schedule = make_schedule("linear", 50)
    x, draws = latent(2)
    made, other = (
        run_sampler(name, gaussian(schedule), x, schedule, Draws.of(seed, draws.index), 10)
        for seed in (0, 1)
    )
    assert torch.equal(made, other) == (name != "ddpm")
