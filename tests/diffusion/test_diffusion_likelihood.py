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
    """Give mean and variance of q(x_{t-1} | x_t, x_0) as a product of two normals."""
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
    share = 1.0 if fraction is None else fraction
    variance = schedule.betas[t] ** share * small ** (1 - share)
    expected = kl_divergence(Normal(mean, small.sqrt()), Normal(guess, variance.sqrt()))
    assert nats.shape == (3,)
    # 1 - alpha^2 of one step, 1e-4 at the least, is known to 1e-12 of itself in float64.
    torch.testing.assert_close(nats, expected.sum((1, 2, 3)), rtol=1e-9, atol=1e-9)


def test_the_true_step_diverges_by_nothing():
    schedule, x_0 = make_schedule("linear", 1000), images()
    x_t = schedule.alphas[10] * x_0 + schedule.sigmas[10] * torch.randn_like(x_0)
    nats = term(schedule, torch.full((3,), 10), x_0, x_t, x_0, torch.zeros_like(x_0))
    torch.testing.assert_close(nats, torch.zeros(3).double(), rtol=0, atol=1e-9)  # rounding


def test_the_first_step_is_the_mass_of_the_grey_level():
    schedule, x_0 = make_schedule("linear", 1000), images()
    x_t = schedule.alphas[0] * x_0 + schedule.sigmas[0] * torch.randn_like(x_0)
    x_0_hat = x_0 + 0.01 * torch.randn_like(x_0)
    nats = term(schedule, torch.zeros(3).long(), x_0, x_t, x_0_hat, None)
    # beta_tilde of the second step, as in the code of Ho et al. 2020.
    variance = (1e-4 + 0.0199 / 999) * schedule.sigmas[0] ** 2 / schedule.sigmas[1] ** 2
    log_scale = torch.full_like(x_0, 0.5 * float(variance.log()))
    expected = grey_level_nll(x_0, x_0_hat, log_scale).sum((1, 2, 3))
    torch.testing.assert_close(nats, expected, rtol=1e-9, atol=0)  # it is known to 1e-12


def test_timesteps_of_a_batch_do_not_mix():
    schedule, x_0 = make_schedule("cosine", 100), images(4)
    t = torch.tensor([0, 1, 50, 99])
    x_t, x_0_hat = x_0 + 0.3, x_0 - 0.1
    together = term(schedule, t, x_0, x_t, x_0_hat, None)
    for i in range(4):
        one = slice(i, i + 1)
        alone = term(schedule, t[one], x_0[one], x_t[one], x_0_hat[one], None)
        torch.testing.assert_close(together[one], alone, rtol=1e-12, atol=0)


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


def test_the_mass_of_a_grey_level_is_the_integral_over_it():
    normal = Normal(torch.tensor(0.1).double(), torch.tensor(0.3).double())
    nll = grey_level_nll(LEVELS, normal.mean, normal.stddev.log())
    for i in (1, 100, 128, 254):
        edges = LEVELS[i] + torch.linspace(-1 / 255, 1 / 255, 2001, dtype=torch.float64)
        mass = torch.trapezoid(normal.log_prob(edges).exp(), edges)
        # Levels lie 2 / 255 apart; the trapezoid's error is 1e-10 of the mass.
        assert float(nll[i]) == pytest.approx(-math.log(float(mass)), abs=1e-8)


def test_grey_levels_mirror():
    mean, log_scale = torch.linspace(-1, 1, 256).double(), torch.tensor(math.log(0.2))
    here = grey_level_nll(LEVELS, mean, log_scale)
    there = grey_level_nll(-LEVELS, -mean, log_scale)
    torch.testing.assert_close(here, there, rtol=1e-9, atol=0)


def test_impossible_grey_levels_stay_finite_with_their_gradient():
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
    certain = exact < 25  # beyond it the mass is held at 1e-12
    # Seven deviations off, float32's 6e-8 in the mean changes the logarithm by 1e-5.
    torch.testing.assert_close(single[certain], exact[certain], rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_prior_is_a_divergence_between_normals(kind: str):
    schedule, x_0 = make_schedule(kind, 1000), images()
    noised = Normal(schedule.alphas[-1] * x_0, schedule.sigmas[-1].expand_as(x_0))
    expected = kl_divergence(noised, Normal(0.0, 1.0)).sum((1, 2, 3))
    # The variance is within 4e-5 of 1: what is left after cancelling has 1e-16 of error.
    torch.testing.assert_close(prior_kl(schedule, x_0), expected, rtol=1e-6, atol=1e-12)


def test_prior_is_nothing_without_signal():
    assert not prior_kl(make_schedule("linear", 100, zero_terminal_snr=True), images()).any()
