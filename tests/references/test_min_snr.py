"""Loss weights of min-SNR, computed by hand.

Source: Hang et al. 2023, "Efficient diffusion training via min-SNR weighting strategy", section
3.4: w = min(SNR, gamma) for x_0, min(SNR, gamma) / SNR for eps, min(SNR, gamma) / (SNR + 1) for v.
Zero terminal SNR: Lin et al. 2024, "Common diffusion noise schedules and sample steps are flawed",
algorithm 1. The weight 1 at SNR 0 is our choice, as these formulas give 0 there.
"""

from __future__ import annotations

import pytest
import torch
from small_diffusion import SAMPLE, RecordingNet, objective

from dgm.diffusion.config import DiffusionConfig
from dgm.diffusion.parameterization import PredictionKind, loss_weight
from dgm.diffusion.schedule import make_schedule
from dgm.objective import Batch
from dgm.rng import Draws

SNRS = [0.01, 0.25, 1.0, 4.0, 5.0, 20.0, 1000.0]


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
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8, generator=generator)
    batch, draws = Batch(images, torch.zeros(2, dtype=torch.int64)), Draws.of(0, torch.arange(2))
    loss, _ = made.errors_at({"net": RecordingNet()}, batch, torch.tensor([49, 49]), draws)
    assert (loss > 0.01).all()
