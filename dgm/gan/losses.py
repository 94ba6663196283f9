"""What discriminator and generator minimise; logits and losses of images, each [B]."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

LossName = Literal["non_saturating", "hinge", "least_squares"]


class Judged(NamedTuple):
    """The discriminator's loss for real and for generated images."""

    real: Tensor
    fake: Tensor


def discriminator_loss(kind: LossName, logits_real: Tensor, logits_fake: Tensor) -> Judged:
    """Compute the loss of telling real from generated images, logits above 0 being real.

    non_saturating: cross-entropy (Goodfellow et al. 2014, equation 1); hinge (Lim and Ye 2017);
    least_squares to 1 and -1, so that 0 lies in the middle (Mao et al. 2017, equation 8).
    """
    if kind == "non_saturating":
        return Judged(functional.softplus(-logits_real), functional.softplus(logits_fake))
    if kind == "hinge":
        return Judged(torch.relu(1 - logits_real), torch.relu(1 + logits_fake))
    return Judged(0.5 * (logits_real - 1).square(), 0.5 * (logits_fake + 1).square())


def generator_loss(kind: LossName, logits_fake: Tensor) -> Tensor:
    """Compute the loss of being told from real images."""
    if kind == "non_saturating":
        return functional.softplus(-logits_fake)
    return -logits_fake if kind == "hinge" else 0.5 * logits_fake.square()


def r1_penalty(logits_real: Tensor, real: Tensor) -> Tensor:
    """Return |d logits / d image|^2 of each real image, [B] (Mescheder et al. 2018, section 4.1).

    `real` [B, C, H, W] must require a gradient, and each logit depend on its own image only; the
    penalty can be differentiated itself.
    """
    (slope,) = torch.autograd.grad(logits_real.sum(), real, create_graph=True)
    return slope.square().flatten(1).sum(1)
