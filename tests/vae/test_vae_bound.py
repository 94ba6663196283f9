"""The bounds: what nats and the importance-weighted bound are, and that they are bounds."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_vae import SMALL, Known, batch, net, objective
from torch import Tensor
from torch.distributions import Normal

from dgm.common.errors import UserError
from dgm.objective import Batch
from dgm.rng import Draws
from dgm.vae.likelihood import PixelDistribution, discretized_logistic_nll

LIKELIHOODS: list[Any] = ["discretized_logistic", "gaussian"]
likelihoods = pytest.mark.parametrize("likelihood", LIKELIHOODS)


@likelihoods
def test_one_importance_sample_is_the_bound_with_the_kl_of_that_sample(likelihood: Any):
    made, vae = objective(replace(SMALL, likelihood=likelihood)), net()
    whole, draws = batch(6)
    one = made.importance_weighted_nats({"vae": vae}, whole, draws, 1)
    noise = draws.normal("posterior", (made.latent,), torch.float64)
    ratio = vae.encoder(made.pixels.scale(whole.images, torch.float64)).log_ratio(noise)
    found = made.nats({"vae": vae}, whole, draws)
    torch.testing.assert_close(one, found["reconstruction_nll"] - ratio, rtol=1e-12, atol=0)


def two_pixels() -> Batch:
    levels = torch.tensor([[0, 255], [90, 140], [128, 128], [10, 250]], dtype=torch.uint8)
    return Batch(levels.reshape(4, 1, 2, 1), torch.zeros(4, dtype=torch.int64))


def converged(likelihood: Any, known: Known, num_samples: int, chunks: int = 50) -> Tensor:
    """Return the bound of many samples, from chunks with different draws: nats [4]."""
    made = objective(replace(SMALL, likelihood=likelihood), latent=2)
    whole = two_pixels()
    many = Batch(whole.images.repeat(chunks, 1, 1, 1), whole.labels.repeat(chunks))
    draws = Draws.of(0, torch.arange(4 * chunks))
    nets = {"vae": known.double()}
    found = made.importance_weighted_nats(nets, many, draws, num_samples // chunks)
    return -(torch.logsumexp(-found.reshape(chunks, 4), 0) - math.log(chunks))


def test_importance_weighted_gaussian_converges_to_the_known_mass():
    known = Known(slope=0.6, offset=0.05, log_scale=-1.0)
    marginal = Normal(0.05, math.sqrt(0.6**2 + math.exp(-2.0)))
    levels = two_pixels().images.double().flatten(1)
    mass = marginal.cdf((levels + 1) / 128 - 1) - marginal.cdf(levels / 128 - 1)
    expected = -mass.log().sum(1)
    found = converged("gaussian", known, 20_000)
    # Weights deviate by about their mean, so four standard errors are 4 / sqrt(20,000) = 0.03.
    torch.testing.assert_close(found, expected, rtol=0, atol=0.03)


def test_importance_weighted_logistic_converges_to_the_known_mass():
    known = Known(slope=0.6, offset=0.05, log_scale=-2.0)
    z = torch.linspace(-9, 9, 4001).double()
    levels = torch.arange(256, dtype=torch.uint8).reshape(256, 1, 1, 1)
    mean = (0.6 * z + 0.05).reshape(1, 1, 1, -1)
    given = PixelDistribution(mean, torch.full_like(mean, -2.0))
    nll = discretized_logistic_nll(levels, given)[:, 0, 0]
    masses = torch.trapezoid(torch.exp(Normal(0.0, 1.0).log_prob(z) - nll), z)
    assert float(masses.sum()) == pytest.approx(1, abs=1e-9)
    expected = -masses.log()[two_pixels().images.long().flatten(1)].sum(1)
    found = converged("discretized_logistic", known, 20_000)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05)  # weights vary more


@likelihoods
def test_nats_exceed_the_known_nll(likelihood: Any):
    known = Known(slope=0.6, offset=0.05, log_scale=-1.0)
    close = converged(likelihood, known, 20_000)
    made = objective(replace(SMALL, likelihood=likelihood), latent=2)
    whole, times = two_pixels(), 10_000
    many = Batch(whole.images.repeat(times, 1, 1, 1), whole.labels.repeat(times))
    found = made.nats({"vae": known.double()}, many, Draws.of(1, torch.arange(4 * times)))
    gap = (found["reconstruction_nll"] + found["kl"]).reshape(times, 4) - close
    assert float(gap.mean()) > 4 * float(gap.std()) / math.sqrt(4 * times) > 0


def test_zero_importance_samples_are_refused():
    whole, draws = batch(2)
    with pytest.raises(UserError, match="num_samples is 0"):
        objective().importance_weighted_nats({"vae": net()}, whole, draws, 0)
