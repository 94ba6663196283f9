"""What the network predicts, and how one prediction is converted into another.

With alpha^2 + sigma^2 = 1 and x_t = alpha x_0 + sigma eps, any one of eps, x_0 and
v = alpha eps - sigma x_0 (Salimans and Ho 2022, appendix D) together with x_t gives the others.
In all functions alpha and sigma broadcast over [B, C, H, W].
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

PredictionKind = Literal["eps", "x_0", "v"]
Weighting = Literal["simple", "min_snr"]
Level = TypeVar("Level", Tensor, float)


def q_sample(x_0: Tensor, eps: Tensor, alpha: Level, sigma: Level) -> Tensor:
    """Return x_t = alpha x_0 + sigma eps (Ho et al. 2020, equation 4); alpha, sigma broadcast."""
    return alpha * x_0 + sigma * eps


class Denoised(NamedTuple):
    """A denoiser's estimates given x_t: x_0 and eps [B, C, H, W], and the learned variance."""

    x_0: Tensor
    eps: Tensor
    variance_fraction: Tensor | None = None  # in [0, 1]: 0 is beta_tilde, 1 is beta (log scale)


def to_prediction(
    kind: PredictionKind, x_0: Tensor, eps: Tensor, alpha: Level, sigma: Level
) -> Tensor:
    """Return what the network should predict, [B, C, H, W]."""
    if kind == "eps":
        return eps
    if kind == "x_0":
        return x_0
    return alpha * eps - sigma * x_0


def to_x_0_and_eps(
    kind: PredictionKind, prediction: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor
) -> tuple[Tensor, Tensor]:
    """Convert a prediction into (x_0, eps), exactly."""
    if kind == "eps":
        return (x_t - sigma * prediction) / alpha, prediction
    if kind == "x_0":
        return prediction, (x_t - alpha * prediction) / sigma
    return alpha * x_t - sigma * prediction, sigma * x_t + alpha * prediction


def loss_weight(
    kind: PredictionKind, weighting: Weighting, snr: Tensor, gamma: float = 5.0
) -> Tensor:
    """Return the weight of the squared error of a prediction, [B].

    `simple` is 1. `min_snr` is min(snr, gamma) for x_0 (Hang et al. 2023, section 3.4),
    min(snr, gamma) / snr for eps and min(snr, gamma) / (snr + 1) for v.

    At SNR 0 (zero terminal SNR, Lin et al. 2024) these formulas give v and x_0 the weight 0, so the
    timestep where sampling starts would not be trained although its target is defined (v = -x_0).
    The weight there is 1 instead, as for `simple`. For eps the formula is 0 / 0, and
    `DiffusionObjective` refuses that combination.
    """
    if weighting == "simple":
        return torch.ones_like(snr)
    clamped = snr.clamp(max=gamma)
    if kind == "eps":
        return clamped / snr
    weight = clamped if kind == "x_0" else clamped / (snr + 1)
    return torch.where(snr == 0, torch.ones_like(weight), weight)
