"""Predictions and their conversion, and loss weights of min-SNR, computed by hand.

Source: Hang et al. 2023, "Efficient diffusion training via min-SNR weighting strategy", section
3.4: w = min(SNR, gamma) for x_0, min(SNR, gamma) / SNR for eps, min(SNR, gamma) / (SNR + 1) for v.
Zero terminal SNR: Lin et al. 2024, "Common diffusion noise schedules and sample steps are flawed",
algorithm 1. The weight 1 at SNR 0 is our choice, as these formulas give 0 there.
"""

from __future__ import annotations

import itertools
from typing import get_args

import pytest
import torch
from small_diffusion import SAMPLE, RecordingNet, batch, objective

from dgm.diffusion.config import DiffusionConfig
from dgm.diffusion.parameterization import (
    PredictionKind,
    loss_weight,
    to_prediction,
    to_x_0_and_eps,
)
from dgm.diffusion.schedule import linear, make_schedule

SNRS = [0.01, 0.25, 1.0, 4.0, 5.0, 20.0, 1000.0]
KINDS = get_args(PredictionKind)


@pytest.mark.parametrize(
    "kind, gamma, expected",
    [
        ("x_0", 5.0, [0.01, 0.25, 1.0, 4.0, 5.0, 5.0, 5.0]),
        ("x_0", 1.0, [0.01, 0.25, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("eps", 5.0, [1.0, 1.0, 1.0, 1.0, 1.0, 0.25, 0.005]),
        ("eps", 1.0, [1.0, 1.0, 1.0, 0.25, 0.2, 0.05, 0.001]),
        ("v", 5.0, [0.01 / 1.01, 0.2, 0.5, 0.8, 5 / 6, 5 / 21, 5 / 1001]),
        ("v", 1.0, [0.01 / 1.01, 0.2, 0.5, 0.2, 1 / 6, 1 / 21, 1 / 1001]),
    ],
)
def test_weights_are_the_papers(kind: PredictionKind, gamma: float, expected: list[float]):
    snr = torch.tensor(SNRS, dtype=torch.float64)
    found = loss_weight(kind, "min_snr", snr, gamma)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["v", "x_0"])
@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_last_timestep_is_trained_with_zero_terminal_snr(
    kind: PredictionKind, name: str, dtype: torch.dtype
):
    snr = make_schedule(name, 1000, zero_terminal_snr=True).snr.to(dtype)
    weight = loss_weight(kind, "min_snr", snr)
    assert float(snr[-1]) == 0 and float(weight[-1]) == 1
    assert weight.isfinite().all() and weight.dtype == dtype
    # Every other timestep has the weight of the paper.
    expected = snr[:-1].clamp(max=5.0) / (1 if kind == "x_0" else snr[:-1] + 1)
    torch.testing.assert_close(weight[:-1], expected)


def test_an_error_at_the_last_timestep_enters_the_loss():
    config = DiffusionConfig(
        num_timesteps=50, zero_terminal_snr=True, prediction="v", weighting="min_snr"
    )
    made = objective(config, SAMPLE)
    given, draws = batch(2)
    loss, _ = made.errors_at({"net": RecordingNet()}, given, torch.tensor([49, 49]), draws)
    assert (loss > 0.01).all()


@pytest.mark.parametrize("kinds", itertools.product(KINDS, repeat=2))
@pytest.mark.parametrize("t", [0, 1, 500, 999])
def test_conversion_between_predictions_is_exact(
    kinds: tuple[PredictionKind, PredictionKind], t: int
):
    schedule = linear(1000)
    alpha, sigma = schedule.alphas[t], schedule.sigmas[t]
    x_t, prediction = torch.randn(2, 8, 3, 4, 4, dtype=torch.float64)
    x_0, eps = to_x_0_and_eps(kinds[0], prediction, x_t, alpha, sigma)
    other = to_prediction(kinds[1], x_0, eps, alpha, sigma)
    converted = to_x_0_and_eps(kinds[1], other, x_t, alpha, sigma)
    # Numbers reach |x_t| / 0.006 = 600, so 1e-12 of that.
    torch.testing.assert_close(converted, (x_0, eps), rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(alpha * x_0 + sigma * eps, x_t, rtol=1e-12, atol=1e-12)


def test_the_targets_are_their_definitions():
    x_0, eps = torch.randn(2, 8, 3, 4, 4, dtype=torch.float64)
    alpha, sigma = 0.6, 0.8
    assert to_prediction("eps", x_0, eps, alpha, sigma) is eps
    assert to_prediction("x_0", x_0, eps, alpha, sigma) is x_0
    expected = alpha * eps - sigma * x_0
    assert torch.equal(to_prediction("v", x_0, eps, alpha, sigma), expected)


def test_v_and_x_0_are_converted_at_zero_snr():
    x_t = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    out = torch.randn_like(x_t)
    zero, one = torch.zeros(()), torch.ones(())
    assert torch.equal(to_x_0_and_eps("v", out, x_t, zero, one)[0], -out)
    assert torch.equal(to_x_0_and_eps("v", out, x_t, zero, one)[1], x_t)
    assert torch.equal(to_x_0_and_eps("x_0", out, x_t, zero, one)[1], x_t)


@pytest.mark.parametrize("kind", KINDS)
def test_simple_weights_are_one(kind: PredictionKind):
    assert torch.equal(loss_weight(kind, "simple", linear(10).snr), torch.ones(10).double())
