"""The likelihoods of stored pixels: masses that sum to 1, valid bounds, draws that match them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from dgm.rng import Draws
from dgm.vae.likelihood import (
    PixelDistribution,
    discretized_logistic_nll,
    gaussian_nll,
    sample_pixels,
)
from dgm.vae.networks import LOG_SCALE_BOUNDS

LEVELS = torch.arange(256, dtype=torch.uint8)[:, None, None, None]  # 256 images of one pixel
MEANS = [-30.0, -1.2, -1.0, -0.5, 0.003, 0.99, 1.0, 30.0]
LOG_SCALES = [*LOG_SCALE_BOUNDS, -12.0, -5.0, -2.0, 0.0, 12.0]


def pixels(mean: float, log_scale: float, dtype: torch.dtype = torch.float64) -> PixelDistribution:
    shape = 256, 1, 1, 1
    return PixelDistribution(*(torch.full(shape, v, dtype=dtype) for v in (mean, log_scale)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("log_scale", LOG_SCALES)
def test_masses_of_all_grey_levels_sum_to_one(mean: float, log_scale: float, dtype: torch.dtype):
    nll = discretized_logistic_nll(LEVELS, pixels(mean, log_scale, dtype))
    assert nll.isfinite().all() and (nll >= 0).all()
    # The edges of a level are (x - mean) / scale, whose numerator, about 1, float32 rounds by 6e-8:
    # neighboring levels may overlap by 6e-8 / scale, which is 0.01 for a scale of e^-12.
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5 + 6e-8 * math.exp(-log_scale)
    assert float(torch.exp(-nll.double()).sum()) == pytest.approx(1, abs=tolerance)


@pytest.mark.parametrize("level", [0, 1, 100, 254, 255])
@pytest.mark.parametrize("mean, scale", [(0.1, 0.3), (-0.98, 0.01), (0.7, 0.05)])
def test_mass_is_the_difference_of_sigmoids(level: int, mean: float, scale: float):
    nll = discretized_logistic_nll(LEVELS, pixels(mean, math.log(scale)))[level]
    x = level / 127.5 - 1

    def below(edge: float) -> float:
        return 1 / (1 + math.exp(-(edge - mean) / scale))

    upper = 1.0 if level == 255 else below(x + 1 / 255)
    lower = 0.0 if level == 0 else below(x - 1 / 255)
    mass = upper - lower
    # The difference itself has 1e-16 of error, which matters for a mass of 1e-9.
    assert math.exp(-float(nll)) == pytest.approx(mass, rel=1e-9, abs=1e-15)


def test_logistic_is_right_in_the_far_tail_in_float32():
    mean, log_scale = -0.5, math.log(0.002)
    exact = discretized_logistic_nll(LEVELS, pixels(mean, log_scale))
    single = discretized_logistic_nll(LEVELS, pixels(mean, log_scale, torch.float32))
    # The NLL reaches 750; x - mean, of about 1, is rounded by 6e-8 and divided by the scale.
    torch.testing.assert_close(single.double(), exact, rtol=1e-5, atol=1e-4)
    assert exact.max() > 700


@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("log_scale", LOG_SCALES)
def test_logistic_has_a_finite_gradient_and_pulls_the_mean_to_the_pixel(
    mean: float, log_scale: float
):
    given = pixels(mean, log_scale, torch.float32)
    for part in given:
        part.requires_grad_()
    discretized_logistic_nll(LEVELS, given).sum().backward()
    for part in given:
        assert part.grad is not None and part.grad.isfinite().all()
    assert given.mean.grad is not None
    pull = -given.mean.grad.flatten()
    x = LEVELS.flatten().float() / 127.5 - 1
    away = (x.abs() < 1) & ((x - mean).abs() > 1 / 255)
    # A scale of e^12 leaves differences below what float32 tells apart.
    assert log_scale == 12.0 or torch.equal(pull.sign()[away], (x - mean).sign()[away])
    # The first and last level reach to infinity: they pull outwards, wherever the mean is.
    assert pull[0] <= 0 <= pull[-1]


def test_gaussian_nll_is_of_the_density_per_grey_level():
    x = torch.rand(4, 3, 5, 5).double()
    given = PixelDistribution(torch.randn_like(x), torch.randn_like(x))
    expected = -Normal(given.mean, given.log_scale.exp()).log_prob(x) + math.log(128)
    torch.testing.assert_close(gaussian_nll(x, given), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [0.003, 0.02, 0.5])
def test_gaussian_bounds_the_mass_of_grey_levels(scale: float):
    given, normal = pixels(0.1, math.log(scale)), Normal(0.1, scale)
    noise = (torch.arange(1000).double() + 0.5) / 1000  # averaged over, as for dequantization noise
    levels = LEVELS.flatten().double()[:, None]
    x = (levels + noise) / 128 - 1
    nll = gaussian_nll(x, PixelDistribution(*(part[:, :, 0, 0] for part in given))).mean(1)
    edges = (torch.arange(257).double() / 128 - 1).double()
    mass = normal.cdf(edges[1:]) - normal.cdf(edges[:-1])
    certain = mass > 1e-8  # smaller ones are lost in the difference
    bound, truth = nll[certain], -mass[certain].log()
    assert (bound >= truth - 1e-6).all()
    # The bound is close where log p hardly changes within a level: the gap is at most its variance
    # there, about ((x - mean) / scale^2 / 128)^2 / 12.
    if scale == 0.5:
        torch.testing.assert_close(bound, truth, rtol=0, atol=1e-4)
    total = torch.exp(-nll).sum()
    assert float(total) < 1 + 1e-6


def drawn(name, mean: float, log_scale: float) -> Tensor:
    count, side = 50, 16
    shape = count, 1, side, side
    given = PixelDistribution(*(torch.full(shape, v) for v in (mean, log_scale)))
    return sample_pixels(name, given, Draws.of(3, torch.arange(count)))


@pytest.mark.parametrize("mean, log_scale", [(0.2, -2.0), (-0.9, -3.0), (0.4, -4.5)])
def test_drawn_pixels_have_the_masses_of_the_likelihood(mean: float, log_scale: float):
    normal = Normal(mean, math.exp(log_scale))
    edges = torch.arange(257).double() / 128 - 1
    edges[0], edges[-1] = -math.inf, math.inf
    masses = {
        "discretized_logistic": torch.exp(
            -discretized_logistic_nll(LEVELS, pixels(mean, log_scale)).flatten()
        ),
        "gaussian": normal.cdf(edges[1:]) - normal.cdf(edges[:-1]),
    }
    for name, mass in masses.items():
        x = drawn(name, mean, log_scale)
        assert x.abs().max() <= 1
        levels = ((x + 1) * 127.5).round().long().flatten()
        below = torch.bincount(levels, minlength=256).double().cumsum(0) / len(levels)
        # Kolmogorov and Smirnov: beyond 2 / sqrt(n) once in 1500 times.
        assert float((below - mass.cumsum(0)).abs().max()) < 2 / math.sqrt(len(levels))
