"""Samplers against exact answers: a Gaussian mixture, whose denoiser has a closed form, and scipy.

Sources. E[x_0 | x_t] of x_0 ~ sum_k w_k N(m_k, s_k^2 I) and x_t = alpha x_0 + sigma eps: component
k has the posterior weight w_k N(x_t; alpha m_k, v_k I), v_k = alpha^2 s_k^2 + sigma^2, and the mean
m_k + alpha s_k^2 / v_k (x_t - alpha m_k) (Bayes' rule). Probability-flow ODE: Song et al. 2021,
"Score-based generative modeling through SDEs", equation 13, in the form of Song et al. 2021,
"Denoising diffusion implicit models", equation 14: d(x / alpha) / d(sigma / alpha) = eps, which
scipy.integrate.solve_ivp integrates. Orders: DDIM 1 (Lu et al. 2022, "DPM-Solver"),
DPM-Solver++(2M) 2 (Lu et al. 2022, "DPM-Solver++"), Heun 2. Posterior of a step: Ho et al. 2020,
equations 6 and 7.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, get_args

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from dgm.diffusion import samplers
from dgm.diffusion.parameterization import Denoised
from dgm.diffusion.samplers import Denoiser, SamplerName, run_sampler
from dgm.diffusion.schedule import Schedule, make_schedule
from dgm.rng import Draws

# Two components far apart, two that overlap each other; all of different width. In 3 dimensions.
WEIGHTS = torch.tensor([0.3, 0.3, 0.2, 0.2], dtype=torch.float64)
MEANS = torch.tensor(
    [[-2.0, -1.0, 0.5], [2.0, 1.5, -1.0], [0.3, 0.0, 0.2], [0.8, 0.4, 0.0]], dtype=torch.float64
)
NAMES = get_args(SamplerName)
WIDTHS = torch.tensor([0.4, 0.5, 0.5, 0.3], dtype=torch.float64)


def mean_x_0(x: np.ndarray, alpha: float, sigma: float) -> np.ndarray:
    """Return E[x_0 | x_t] of the mixture for x_t [N, 3]."""
    weights, means, widths = WEIGHTS.numpy(), MEANS.numpy(), WIDTHS.numpy()
    variance = alpha**2 * widths**2 + sigma**2
    apart = x[:, None] - alpha * means
    log_weight = np.log(weights) - 1.5 * np.log(variance) - (apart**2).sum(2) / (2 * variance)
    weight = np.exp(log_weight - log_weight.max(1, keepdims=True))
    weight /= weight.sum(1, keepdims=True)
    posterior = means + (alpha * widths**2 / variance)[:, None] * apart
    return (weight[:, :, None] * posterior).sum(1)


def mixture(schedule: Schedule) -> Denoiser:
    def denoise(x: Tensor, t: int) -> Denoised:
        alpha, sigma = float(schedule.alphas[t]), float(schedule.sigmas[t])
        x_0 = torch.from_numpy(mean_x_0(x.flatten(1).numpy(), alpha, sigma)).reshape(x.shape)
        return Denoised(x_0, (x - alpha * x_0) / sigma)

    return denoise


def latent(count: int) -> tuple[Tensor, Draws]:
    draws = Draws.of(0, torch.arange(count))
    return draws.normal("latent", (1, 1, 3), torch.float64).permute(0, 3, 1, 2), draws


def flow_to(x: Tensor, schedule: Schedule) -> Tensor:
    """Return x_t at the first noise level, by the ODE from x at the last."""
    ratios = schedule.sigmas / schedule.alphas  # the noise level of x_t / alpha
    first, last = float(ratios[0]), float(ratios[-1])

    def slope(log_ratio: float, flat: np.ndarray) -> np.ndarray:
        ratio = math.exp(log_ratio)
        alpha = 1 / math.sqrt(1 + ratio**2)
        y = flat.reshape(-1, 3)
        eps = (y - mean_x_0(alpha * y, alpha, alpha * ratio)) / ratio
        return (ratio * eps).ravel()  # d ratio = ratio d log ratio

    start = (x / schedule.alphas[-1]).flatten().numpy()
    found = solve_ivp(
        slope, (math.log(last), math.log(first)), start, method="DOP853", rtol=1e-11, atol=1e-11
    )
    assert found.success
    return float(schedule.alphas[0]) * torch.from_numpy(found.y[:, -1]).reshape(x.shape)


def endpoint(x: Tensor, schedule: Schedule) -> Tensor:
    """Return the ODE's image: at the first noise level, then denoised, as every sampler ends."""
    return mixture(schedule)(flow_to(x, schedule), 0).x_0


# Equal steps in log(alpha / sigma), down to a sigma of e^-6, where x_0 and E[x_0 | x_t] agree. The
# numbers of steps divide T, so that all of them step evenly.
TIMESTEPS = 3840


def refined() -> Schedule:
    return Schedule(torch.sigmoid(2 * torch.linspace(6, -3, TIMESTEPS, dtype=torch.float64)))


def errors_of(name: SamplerName, schedule: Schedule, counts: list[int]) -> list[float]:
    x, draws = latent(64)
    expected = endpoint(x, schedule)
    denoiser = mixture(schedule)
    return [
        float(
            (run_sampler(name, denoiser, x, schedule, draws, steps) - expected)
            .flatten(1).norm(dim=1).mean()
        )
        for steps in counts
    ]  # fmt: skip


@pytest.mark.parametrize("name, order", [("ddim", 1), ("dpmpp_2m", 2), ("heun", 2)])
def test_errors_fall_by_the_order_of_the_method(name: SamplerName, order: int):
    errors = errors_of(name, refined(), [160, 320, 640])
    for longer, shorter in itertools.pairwise(errors):
        assert math.log2(longer / shorter) == pytest.approx(order, abs=0.2)  # terms of next order


def test_heun_is_of_second_order_in_the_angle_down_to_the_image():
    # The cosine schedule without its offset: equal steps in the angle, the last of which leads to
    # the clean image and is of first order, hence of error h^2.
    angle = torch.arange(1, 4001, dtype=torch.float64) / 4000 * (0.9995 * math.pi / 2)
    errors = errors_of("heun", Schedule(angle.cos().square()), [50, 100, 200])
    for longer, shorter in itertools.pairwise(errors):
        assert math.log2(longer / shorter) == pytest.approx(2, abs=0.2)


def test_heun_is_exact_for_constant_image_and_noise():
    schedule = make_schedule("cosine", 1000, zero_terminal_snr=True)
    generator = torch.Generator().manual_seed(0)
    x_0, eps = torch.randn(2, 4, 1, 1, 3, generator=generator, dtype=torch.float64)
    seen: list[float] = []

    def denoise(x: Tensor, t: int) -> Denoised:
        seen.append(float((x - schedule.alphas[t] * x_0 - schedule.sigmas[t] * eps).abs().max()))
        return Denoised(x_0, eps)

    start = schedule.alphas[-1] * x_0 + schedule.sigmas[-1] * eps
    made = samplers.heun(denoise, start, schedule, latent(4)[1], 5)
    assert len(seen) == 9 and max(seen) < 1e-14
    torch.testing.assert_close(made, x_0)


MEAN, DEVIATION = 0.3, 0.5


def gaussian(schedule: Schedule) -> Denoiser:
    def denoise(x: Tensor, t: int) -> Denoised:
        alpha, sigma = float(schedule.alphas[t]), float(schedule.sigmas[t])
        variance = alpha**2 * DEVIATION**2 + sigma**2
        x_0 = MEAN + alpha * DEVIATION**2 / variance * (x - alpha * MEAN)
        return Denoised(x_0, (x - alpha * x_0) / sigma)

    return denoise


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, knobs",
    [
        ("ddpm", {"variance": "small"}),
        ("ddpm", {"variance": "large"}),
        ("ddim", {"eta": 1.0}),
        ("ddim", {"eta": 0.5}),
    ],
)
def test_ancestral_samples_converge_to_the_mean_and_variance_of_a_gaussian(
    name: SamplerName, knobs: dict[str, Any]
):
    schedule = make_schedule("cosine", 1000)
    draws = Draws.of(0, torch.arange(2000))
    x = draws.normal("latent", (8, 8, 1), torch.float64).permute(0, 3, 1, 2)
    errors = []
    for steps in (10, 40, 200, 1000):
        made = run_sampler(name, gaussian(schedule), x, schedule, draws, steps, **knobs)
        errors.append(abs(float(made.var()) - DEVIATION**2))
        # Four standard errors of 128,000 pixels.
        assert abs(float(made.mean()) - MEAN) < 4 * DEVIATION / math.sqrt(made.numel()) + 1 / steps
    assert errors[0] > errors[1] > errors[2]
    # Four standard errors of the variance, 0.004, and what a thousand steps leave.
    assert errors[3] < 4 * math.sqrt(2 / 128_000) * DEVIATION**2 + 0.003


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("steps", [1, 7, 100])
def test_ddim_with_eta_one_is_ddpm_of_small_variance(
    monkeypatch: pytest.MonkeyPatch, steps: int, zero_terminal_snr: bool
):
    def noise(x: Tensor, draws: Draws, purpose: str, number: int) -> Tensor:
        return draws.at(number).normal("shared", (1, 1, 3), x.dtype).permute(0, 3, 1, 2)

    monkeypatch.setattr(samplers, "_noise_like", noise)
    schedule = make_schedule("cosine", 100, zero_terminal_snr)
    x, draws = latent(16)
    given = (mixture(schedule), x, schedule, draws, steps)
    torch.testing.assert_close(
        samplers.ddim(*given, eta=1.0), samplers.ddpm(*given, variance="small"), rtol=0, atol=1e-9
    )


def test_variance_of_a_step_is_that_of_bayes_rule():
    schedule = make_schedule("linear", 1000)
    alphas, sigmas = schedule.alphas.tolist(), schedule.sigmas.tolist()
    level, next_level = (samplers.NoiseLevel(t, alphas[t], sigmas[t]) for t in (700, 450))
    # x_s given x_0 and x_t: a normal prior about alpha_s x_0, and one observation x_t of r x_s.
    ratio = level.alpha / next_level.alpha
    noise = level.sigma**2 - ratio**2 * next_level.sigma**2
    precision = 1 / next_level.sigma**2 + ratio**2 / noise
    expected = (
        next_level.alpha / next_level.sigma**2 / precision, ratio / noise / precision,
        noise, 1 / precision,
    )  # fmt: skip
    assert samplers.posterior_coefficients(level, next_level) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_inverse_of_ddim_returns_to_the_noise(zero_terminal_snr: bool):
    schedule = make_schedule("cosine", 1000, zero_terminal_snr)
    denoiser, (x, draws) = mixture(schedule), latent(32)
    made = samplers.ddim(denoiser, x, schedule, draws, 200)
    errors = []
    for repeats in (1, 3, 12):
        found = samplers.ddim_inverse(denoiser, made, schedule, 200, repeats)
        again = samplers.ddim(denoiser, found, schedule, draws, 200)
        errors.append(float((again - made).abs().max()))
    assert errors[0] > errors[1] > errors[2] < 1e-6
    torch.testing.assert_close(found, x, rtol=0, atol=1e-4)


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
