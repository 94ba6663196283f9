"""The posterior's terms against torch.distributions; free bits and the weight of the KL."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from dgm.vae.posterior import Posterior, apply_free_bits, kl_weight


def posterior(count: int = 5, latent: int = 7) -> Posterior:
    shape = count, latent
    return Posterior(torch.randn(shape).double(), 3 * torch.randn(shape).double())


def as_normal(q: Posterior) -> Normal:
    return Normal(q.mu, torch.exp(0.5 * q.log_var))


def test_kl_is_that_of_torch_distributions():
    q = posterior()
    expected = kl_divergence(as_normal(q), Normal(0.0, 1.0))
    torch.testing.assert_close(q.kl(), expected, rtol=1e-12, atol=1e-12)  # rounding of float64


def test_kl_is_zero_at_the_prior_and_accurate_near_it():
    nothing = torch.zeros(1, 3)
    assert not Posterior(nothing, nothing).kl().any()
    close = Posterior(nothing, nothing + 1e-4).kl()
    # log_var^2 / 4 of 1e-4, whose float32 has seven digits; expm1 keeps three of the difference.
    torch.testing.assert_close(close, nothing + 2.5e-9, rtol=1e-2, atol=0)


def test_latent_is_drawn_with_the_posteriors_mean_and_deviation():
    q = posterior()
    assert torch.equal(q.sample(torch.zeros_like(q.mu)), q.mu)
    one_off = q.sample(torch.ones_like(q.mu)) - q.mu
    torch.testing.assert_close(one_off, as_normal(q).stddev, rtol=1e-9, atol=0)


def test_log_ratio_is_the_prior_over_the_posterior_at_the_drawn_latent():
    q, noise = posterior(), torch.randn(5, 7).double()
    z = q.sample(noise)
    expected = (Normal(0.0, 1.0).log_prob(z) - as_normal(q).log_prob(z)).sum(1)
    torch.testing.assert_close(q.log_ratio(noise), expected, rtol=1e-9, atol=1e-9)


def test_free_bits_apply_to_each_dimension_of_each_image():
    kl = torch.tensor([[0.1, 2.0], [0.6, 0.0]], requires_grad=True)
    clamped = apply_free_bits(kl, 0.5)
    assert clamped.tolist() == pytest.approx([2.5, 1.1])
    clamped.sum().backward()
    assert kl.grad is not None and kl.grad.tolist() == [[0, 1], [1, 0]]


def test_without_free_bits_the_kl_is_the_sum():
    kl = posterior().kl()
    assert torch.equal(apply_free_bits(kl, 0.0), kl.sum(1))


@pytest.mark.parametrize(
    "beta, images_seen, warmup, expected",
    [
        (1.0, 0, 0, 1.0),
        (1.0, 0, 1000, 0.0),
        (1.0, 250, 1000, 0.25),
        (4.0, 250, 1000, 1.0),
        (4.0, 1000, 1000, 4.0),
        (4.0, 10**9, 1000, 4.0),
        (0.0, 500, 1000, 0.0),
    ],
)
def test_weight_of_the_kl_rises_linearly(
    beta: float, images_seen: int, warmup: int, expected: float
):
    assert kl_weight(beta, images_seen, warmup) == expected


def test_extreme_posteriors_stay_finite_with_their_gradient():
    def leaf(value: float) -> Tensor:
        return torch.full((1, 2), value, requires_grad=True)

    for log_var in (-12.0, 6.0):
        mu, spread = leaf(1e4), leaf(log_var)
        q = Posterior(mu, spread)
        total = q.kl().sum() + q.sample(torch.full((1, 2), 5.77)).sum()
        total.backward()
        assert math.isfinite(float(total.detach()))
        assert mu.grad is not None and mu.grad.isfinite().all()
        assert spread.grad is not None and spread.grad.isfinite().all()


@pytest.mark.parametrize("warmup", [0, 7, 1000, 500_000])
def test_the_weight_of_the_kl_is_the_same_number_as_a_tensor(warmup: int):
    for images_seen in (0, 1, 3, 7, 333, 999, 1000, 123_457, 10**9):
        weight = kl_weight(0.7, torch.tensor(images_seen), warmup)
        assert float(weight) == kl_weight(0.7, images_seen, warmup)
