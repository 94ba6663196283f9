"""Predictions: one becomes another exactly, and so do their losses."""

from __future__ import annotations

import itertools
from typing import get_args

import pytest
import torch
from torch import Tensor

from dgm.diffusion.parameterization import (
    PredictionKind,
    loss_weight,
    to_prediction,
    to_x_0_and_eps,
)
from dgm.diffusion.schedule import cosine, linear

KINDS = get_args(PredictionKind)


def noised(t: int, kind: str = "linear") -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return x_0, eps, x_t, alpha, sigma of eight images, float64."""
    schedule = {"linear": linear, "cosine": cosine}[kind](1000)
    alpha, sigma = schedule.alphas[t], schedule.sigmas[t]
    x_0, eps = torch.randn(2, 8, 3, 4, 4, dtype=torch.float64)
    return x_0, eps, alpha * x_0 + sigma * eps, alpha, sigma


@pytest.mark.parametrize("kinds", itertools.product(KINDS, repeat=2))
@pytest.mark.parametrize("t", [0, 1, 500, 999])
def test_conversion_between_predictions_is_exact(
    kinds: tuple[PredictionKind, PredictionKind], t: int
):
    *_, x_t, alpha, sigma = noised(t)
    prediction = torch.randn_like(x_t)  # right or wrong
    x_0, eps = to_x_0_and_eps(kinds[0], prediction, x_t, alpha, sigma)
    other = to_prediction(kinds[1], x_0, eps, alpha, sigma)
    converted = to_x_0_and_eps(kinds[1], other, x_t, alpha, sigma)
    # Sizes reach |x_t| / 0.006 = 600, so 1e-12 of that.
    torch.testing.assert_close(converted, (x_0, eps), rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(alpha * x_0 + sigma * eps, x_t, rtol=1e-12, atol=1e-12)


def test_the_targets_are_their_definitions():
    x_0, eps, _, alpha, sigma = noised(300)
    assert to_prediction("eps", x_0, eps, alpha, sigma) is eps
    assert to_prediction("x_0", x_0, eps, alpha, sigma) is x_0
    expected = alpha * eps - sigma * x_0
    assert torch.equal(to_prediction("v", x_0, eps, alpha, sigma), expected)


def test_v_and_x_0_serve_a_level_without_signal():
    x_t = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    out = torch.randn_like(x_t)
    zero, one = torch.zeros(()), torch.ones(())
    assert torch.equal(to_x_0_and_eps("v", out, x_t, zero, one)[0], -out)
    assert torch.equal(to_x_0_and_eps("v", out, x_t, zero, one)[1], x_t)
    assert torch.equal(to_x_0_and_eps("x_0", out, x_t, zero, one)[1], x_t)


@pytest.mark.parametrize("kind", KINDS)
def test_simple_weights_are_one(kind: PredictionKind):
    assert torch.equal(loss_weight(kind, "simple", linear(10).snr), torch.ones(10).double())
