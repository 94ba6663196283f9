"""Samplers, on data whose best denoiser is known: every pixel normal of mean m and deviation s."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor

from dgm.diffusion import samplers
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
    "name, steps, knobs",
    [
        ("ddpm", 400, {"variance": "small"}),
        ("ddpm", 400, {"variance": "large"}),
        ("ddim", 200, {"eta": 0.0}),
        ("ddim", 400, {"eta": 0.5}),
        ("ddim", 400, {"eta": 1.0}),
        ("dpmpp_2m", 50, {}),
        ("heun", 200, {}),
    ],
)
@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_samples_reach_mean_and_deviation_of_the_data(
    name: SamplerName, steps: int, knobs: dict, kind: str
):
    x, draws = latent(256)
    schedule = make_schedule(kind, 1000)
    made = run_sampler(name, gaussian(schedule), x, schedule, draws, steps, **knobs)
    # Four standard errors of 4,096 pixels (0.0078 and 0.0055), and 0.01 for the steps' length.
    assert abs(float(made.mean()) - MEAN) < 0.031
    assert abs(float(made.std()) - DEVIATION) < 0.032


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
def test_a_denoiser_that_knows_the_image_ends_at_it(name: SamplerName, steps: int):
    schedule = make_schedule("linear", 50)
    x, draws = latent(4)
    image = x.flip(0).clamp(-1, 1)

    def denoise(x_t: Tensor, t: int) -> Denoised:
        return Denoised(image, (x_t - schedule.alphas[t] * image) / schedule.sigmas[t])

    made = run_sampler(name, denoise, x, schedule, draws, steps)
    torch.testing.assert_close(made, image, rtol=0, atol=1e-10)  # float64, alpha of 0.006


@pytest.mark.parametrize("name", NAMES)
def test_one_step_gives_the_denoised_image(name: SamplerName):
    schedule = make_schedule("cosine", 10)
    x, draws = latent(4)
    made = run_sampler(name, gaussian(schedule), x, schedule, draws, 1)
    expected = gaussian(schedule)(x, 9).x_0
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-12)  # rounding of float64


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
def test_an_image_does_not_depend_on_the_batch_it_is_made_in(name: SamplerName):
    schedule = make_schedule("cosine", 100)
    x, draws = latent(6)
    knobs = {"eta": 0.7, "variance": "large"}
    whole = run_sampler(name, gaussian(schedule), x, schedule, draws, 9, **knobs)
    for i in range(6):
        own = Draws.of(0, torch.tensor([i]))
        alone = run_sampler(name, gaussian(schedule), x[i : i + 1], schedule, own, 9, **knobs)
        torch.testing.assert_close(alone[0], whole[i], rtol=0, atol=1e-10)  # rounding


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m", "heun"])
def test_deterministic_samplers_draw_nothing(name: SamplerName, monkeypatch: pytest.MonkeyPatch):
    schedule = make_schedule("linear", 50)
    x, draws = latent(2)

    def refuse(*_: object) -> None:
        raise AssertionError("drew noise")

    monkeypatch.setattr(samplers, "_noise_like", refuse)
    run_sampler(name, gaussian(schedule), x, schedule, draws, 10)
    with pytest.raises(AssertionError, match="drew noise"):
        run_sampler("ddpm", gaussian(schedule), x, schedule, draws, 10)


def test_inverse_of_ddim_reaches_a_level_without_signal():
    schedule = make_schedule("cosine", 100, zero_terminal_snr=True)
    denoiser, (x, draws) = gaussian(schedule), latent(8)
    made = samplers.ddim(denoiser, x, schedule, draws, 20)
    found = samplers.ddim_inverse(denoiser, made, schedule, 20)
    assert bool(found.isfinite().all())
