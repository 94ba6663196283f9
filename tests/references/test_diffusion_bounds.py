"""The variational bound against an independent loop and against torch.distributions.

Ho et al. 2020, "Denoising diffusion probabilistic models", equations 5, 7 and 13, and Nichol and
Dhariwal 2021, "Improved denoising diffusion probabilistic models", equations 10 to 15: variances
`fixed large` (beta), `fixed small` (that of the posterior) and learned (between both). In the first
step fixed large and fixed small are the posterior's variance of the second step.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_ndtr, ndtr
from small_diffusion import batch, objective
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from dgm.diffusion.likelihood import ReverseSteps, bound_term, discretized_gaussian_nll, prior_kl
from dgm.diffusion.objective import DiffusionConfig, DiffusionSampleConfig
from dgm.diffusion.schedule import Schedule, make_schedule
from dgm.preprocessing import DEQUANTIZED, STANDARD

T, COUNT = 40, 3
DIMS = 8 * 8 * 3


class Guess(nn.Module):
    """A net whose prediction is off by a known function of x_t and t, with a given variance."""

    def __init__(self, x_0: Tensor, fraction: float | None):
        super().__init__()
        self.x_0, self.fraction = x_0, fraction

    def guess(self, x_t: Tensor, t: int) -> Tensor:
        return (0.8 * self.x_0 + 0.1 * torch.sin(3 * x_t + t)).clamp(-1, 1)

    def forward(self, x_t: Tensor, t: Tensor, *_: Any) -> Tensor:
        x_0 = self.guess(x_t, int(t[0]))
        if self.fraction is None:
            return x_0
        return torch.cat([x_0, torch.full_like(x_0, 2 * self.fraction - 1)], dim=1)


def gaussian_kl(mean: Any, log_variance: Any, other_mean: Any, other_log_variance: Any) -> Any:
    return 0.5 * (
        other_log_variance - log_variance - 1 + np.exp(log_variance - other_log_variance)
        + (mean - other_mean) ** 2 * np.exp(-other_log_variance)
    )  # fmt: skip


def log_mass_of_level(
    levels: np.ndarray, x: np.ndarray, mean: np.ndarray, scale: Any, half: float
) -> np.ndarray:
    """Return the log-probability of the bin around x under a normal; outer bins are unbounded."""
    upper, lower = (x + half - mean) / scale, (x - half - mean) / scale
    inner = np.log(np.maximum(ndtr(upper) - ndtr(lower), 1e-300))
    return np.where(levels == 0, log_ndtr(upper), np.where(levels == 255, log_ndtr(-lower), inner))


@pytest.mark.parametrize("dequantize", [False, True])
@pytest.mark.parametrize("variance", ["small", "large", 0.0, 0.3, 1.0])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_terms_are_those_of_an_independent_loop(
    schedule: str, variance: str | float, dequantize: bool
) -> None:
    learned = not isinstance(variance, str)
    config = DiffusionConfig(
        schedule=schedule, num_timesteps=T, prediction="x_0", class_conditional=False,
        learned_variance=learned, dequantize=dequantize,
    )  # fmt: skip
    sample = DiffusionSampleConfig(steps=5, variance="large" if learned else variance)
    made = objective(config, sample)
    given, draws = batch(COUNT)
    levels = given.images.permute(0, 3, 1, 2).numpy().astype(float)
    x_0 = (levels + 0.5) / 128 - 1 if dequantize else levels / 127.5 - 1
    half = 1 / 256 if dequantize else 1 / 255
    net = Guess(torch.from_numpy(x_0), variance if learned else None)
    found = made.nats_by_timestep({"net": net}, given, draws)

    # Betas by the papers' own formulas.
    if schedule == "linear":
        betas = np.linspace(1000 / T * 1e-4, 1000 / T * 0.02, T).clip(max=0.999)
    else:
        f = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = (1 - f[1:] / f[:-1]).clip(max=0.999)
    cumulative = np.cumprod(1 - betas)
    before = np.append(1.0, cumulative[:-1])
    posterior = betas * (1 - before) / (1 - cumulative)
    log_clipped = np.log(np.append(posterior[1], posterior[1:]))
    log_variances = {"small": log_clipped, "large": np.log(np.append(posterior[1], betas[1:]))}
    for t in range(T):
        eps = draws.at(t).normal("likelihood", (8, 8, 3), torch.float64).permute(0, 3, 1, 2).numpy()
        x_t = math.sqrt(cumulative[t]) * x_0 + math.sqrt(1 - cumulative[t]) * eps
        guess = net.guess(torch.from_numpy(x_t), t).numpy()
        own = math.sqrt(before[t]) * betas[t] / (1 - cumulative[t])
        of_x_t = math.sqrt(1 - betas[t]) * (1 - before[t]) / (1 - cumulative[t])
        if isinstance(variance, str):
            log_variance = log_variances[variance][t]
        else:
            log_variance = variance * math.log(betas[t]) + (1 - variance) * log_clipped[t]
        mean, true_mean = own * guess + of_x_t * x_t, own * x_0 + of_x_t * x_t
        if t == 0:
            scale = math.exp(0.5 * log_variance)
            nats = -log_mass_of_level(levels, x_0, mean, scale, half)
            nats = np.minimum(nats, -math.log(1e-12))  # the mass is clamped to 1e-12
        else:
            nats = gaussian_kl(true_mean, log_clipped[t], mean, log_variance)
        np.testing.assert_allclose(
            found[:, t].numpy(), nats.sum((1, 2, 3)), rtol=1e-7, atol=1e-8, err_msg=str(t)
        )
    end = gaussian_kl(math.sqrt(cumulative[-1]) * x_0, math.log(1 - cumulative[-1]), 0.0, 0.0)
    terms = made.nats({"net": net}, given, draws)
    np.testing.assert_allclose(terms["prior"].numpy(), end.sum((1, 2, 3)), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(terms["decoder"].numpy(), found[:, 0].numpy(), rtol=0, atol=0)


def test_l_0_is_the_probability_of_the_bin_wherever_x_0_lies_in_it() -> None:
    levels = torch.arange(256.0, dtype=torch.float64)
    mean = torch.linspace(-1.1, 1.1, 256, dtype=torch.float64)
    log_scale = torch.tensor(math.log(0.03), dtype=torch.float64)
    for pixels in (STANDARD, DEQUANTIZED):
        width, middle = pixels.bin_width, pixels.from_levels(levels)
        log_mass = log_mass_of_level(levels.numpy(), middle.numpy(), mean.numpy(), 0.03, width / 2)
        expected = np.minimum(-log_mass, -math.log(1e-12))  # the mass is clamped to 1e-12
        for within in (-0.49, 0.0, 0.3, 0.49):
            found = discretized_gaussian_nll(middle + within * width, mean, log_scale, pixels)
            np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-6)


LEVELS = torch.arange(256, dtype=torch.float64) / 127.5 - 1


def term(schedule: Schedule, t: Tensor, x_0: Tensor, *rest: Any) -> Tensor:
    steps = ReverseSteps.of(schedule, x_0.device, x_0.dtype)
    return bound_term(steps, t, x_0, *rest, STANDARD)


def images(count: int = 3) -> Tensor:
    return LEVELS[torch.randint(256, (count, 3, 4, 4))]


def bayes(schedule: Schedule, t: int, x_0: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance of q(x_{t-1} | x_t, x_0) as a product of two normals."""
    before, beta = schedule.alphas_cumprod[t - 1], schedule.betas[t]
    precision = 1 / (1 - before) + (1 - beta) / beta
    mean = before.sqrt() * x_0 / (1 - before) + (1 - beta).sqrt() * x_t / beta
    return mean / precision, 1 / precision


@pytest.mark.parametrize("t", [1, 2, 500, 999])
@pytest.mark.parametrize("fraction", [None, 0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    "kind, zero_terminal_snr", [("linear", False), ("cosine", False), ("linear", True)]
)
def test_steps_are_divergences_between_normals(
    t: int, fraction: float | None, kind: str, zero_terminal_snr: bool
):
    schedule = make_schedule(kind, 1000, zero_terminal_snr)
    x_0 = images()
    x_t = schedule.alphas[t] * x_0 + schedule.sigmas[t] * torch.randn_like(x_0)
    x_0_hat = x_0 + 0.1 * torch.randn_like(x_0)
    given = "large" if fraction is None else torch.full_like(x_0, fraction)
    nats = term(schedule, torch.full((3,), t), x_0, x_t, x_0_hat, given)
    mean, small = bayes(schedule, t, x_0, x_t)
    guess, _ = bayes(schedule, t, x_0_hat, x_t)
    weight = 1.0 if fraction is None else fraction
    variance = schedule.betas[t] ** weight * small ** (1 - weight)
    expected = kl_divergence(Normal(mean, small.sqrt()), Normal(guess, variance.sqrt()))
    assert nats.shape == (3,)
    # 1 - alpha^2 of one step is 1e-4 or more, with a relative error of 1e-12 in float64.
    torch.testing.assert_close(nats, expected.sum((1, 2, 3)), rtol=1e-9, atol=1e-9)


def test_float32_terms_are_close_to_float64_ones():
    schedule, x_0 = make_schedule("linear", 1000), images(4)
    t = torch.tensor([0, 1, 500, 999])
    column = t[:, None, None, None]
    x_t = schedule.alphas[column] * x_0 + schedule.sigmas[column] * torch.randn_like(x_0)
    x_0_hat = x_0 + 0.005 * torch.randn_like(x_0)
    fraction = torch.rand_like(x_0)
    exact = term(schedule, t, x_0, x_t, x_0_hat, fraction)
    single = term(schedule, t, *(a.float() for a in (x_0, x_t, x_0_hat, fraction)))
    # Means about 1 are known to 1e-7 and are divided by deviations down to 0.007.
    torch.testing.assert_close(single.double(), exact, rtol=1e-3, atol=1e-3)


def test_improbable_grey_levels_have_a_finite_nll_and_gradient():
    mean = torch.full((256,), 3.0, requires_grad=True)
    log_scale = torch.full((256,), -6.0, requires_grad=True)
    nll = discretized_gaussian_nll(LEVELS.float(), mean, log_scale, STANDARD)
    nll.sum().backward()
    assert nll.isfinite().all() and nll.max() <= -math.log(1e-12) + 1e-3
    assert mean.grad is not None and mean.grad.isfinite().all()
    assert log_scale.grad is not None and log_scale.grad.isfinite().all()


def test_float32_masses_are_right_far_from_the_mean():
    mean, log_scale = torch.tensor(-0.5).double(), torch.tensor(math.log(0.05)).double()
    exact = discretized_gaussian_nll(LEVELS, mean, log_scale, STANDARD)
    single = discretized_gaussian_nll(
        LEVELS.float(), mean.float(), log_scale.float(), STANDARD
    ).double()
    certain = exact < 25  # beyond it the mass is clamped to 1e-12
    # Seven deviations off, float32's 6e-8 in the mean changes the logarithm by 1e-5.
    torch.testing.assert_close(single[certain], exact[certain], rtol=0, atol=1e-3)


def test_prior_kl_is_zero_at_zero_snr():
    assert not prior_kl(make_schedule("linear", 100, zero_terminal_snr=True), images()).any()
