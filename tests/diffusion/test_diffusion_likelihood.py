"""The bound's terms against torch.distributions, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from dgm.diffusion.likelihood import ReverseSteps, bound_term, prior_kl
from dgm.diffusion.likelihood import discretized_gaussian_nll as nll_in_bins
from dgm.diffusion.schedule import Schedule, make_schedule
from dgm.preprocessing import STANDARD

LEVELS = torch.arange(256, dtype=torch.float64) / 127.5 - 1


def term(
    schedule: Schedule,
    t: Tensor,
    x_0: Tensor,
    x_t: Tensor,
    x_0_hat: Tensor,
    fraction: Tensor | None,
) -> Tensor:
    steps = ReverseSteps.of(schedule, x_0.device, x_0.dtype)
    variance = "large" if fraction is None else fraction
    return bound_term(steps, t, x_0, x_t, x_0_hat, variance, STANDARD)


def grey_level_nll(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    return nll_in_bins(x, mean, log_scale, STANDARD)


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
    given = None if fraction is None else torch.full_like(x_0, fraction)
    nats = term(schedule, torch.full((3,), t), x_0, x_t, x_0_hat, given)
    mean, small = bayes(schedule, t, x_0, x_t)
    guess, _ = bayes(schedule, t, x_0_hat, x_t)
    weight = 1.0 if fraction is None else fraction
    variance = schedule.betas[t] ** weight * small ** (1 - weight)
    expected = kl_divergence(Normal(mean, small.sqrt()), Normal(guess, variance.sqrt()))
    assert nats.shape == (3,)
    # 1 - alpha^2 of one step, 1e-4 at the least, is known to 1e-12 of itself in float64.
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


@pytest.mark.parametrize("mean", [-1.2, -0.95, 0.1, 1.0])
@pytest.mark.parametrize("scale", [0.002, 0.05, 0.5])
def test_the_masses_of_all_grey_levels_sum_to_one(mean: float, scale: float):
    nll = grey_level_nll(LEVELS, torch.tensor(mean).double(), torch.tensor(math.log(scale)))
    # A mass is at least 1e-12, 256 of them at most 3e-10.
    assert float(torch.exp(-nll).sum()) == pytest.approx(1, abs=3e-10)


def test_improbable_grey_levels_have_a_finite_nll_and_gradient():
    mean = torch.full((256,), 3.0, requires_grad=True)
    log_scale = torch.full((256,), -6.0, requires_grad=True)
    nll = grey_level_nll(LEVELS.float(), mean, log_scale)
    nll.sum().backward()
    assert nll.isfinite().all() and nll.max() <= -math.log(1e-12) + 1e-3
    assert mean.grad is not None and mean.grad.isfinite().all()
    assert log_scale.grad is not None and log_scale.grad.isfinite().all()


def test_float32_masses_are_right_far_from_the_mean():
    mean, log_scale = torch.tensor(-0.5).double(), torch.tensor(math.log(0.05)).double()
    exact = grey_level_nll(LEVELS, mean, log_scale)
    single = grey_level_nll(LEVELS.float(), mean.float(), log_scale.float()).double()
    certain = exact < 25  # beyond it the mass is clamped to 1e-12
    # Seven deviations off, float32's 6e-8 in the mean changes the logarithm by 1e-5.
    torch.testing.assert_close(single[certain], exact[certain], rtol=0, atol=1e-3)


def test_prior_kl_is_zero_at_zero_snr():
    assert not prior_kl(make_schedule("linear", 100, zero_terminal_snr=True), images()).any()
