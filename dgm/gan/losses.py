"""Losses of discriminator and generator; logits and losses are per image, [B]."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

LossName = Literal["non_saturating", "hinge", "least_squares"]


def discriminator_loss(
    kind: LossName, logits_real: Tensor, logits_fake: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the discriminator's loss on real and on generated images; logits > 0 mean real.

    non_saturating: cross-entropy (Goodfellow et al. 2014, equation 1); hinge (Lim and Ye 2017);
    least_squares with targets 1 and -1, so that 0 is undecided (Mao et al. 2017, equation 8).
    """
    if kind == "non_saturating":
        return functional.softplus(-logits_real), functional.softplus(logits_fake)
    if kind == "hinge":
        return torch.relu(1 - logits_real), torch.relu(1 + logits_fake)
    return 0.5 * (logits_real - 1).square(), 0.5 * (logits_fake + 1).square()


def generator_loss(kind: LossName, logits_fake: Tensor) -> Tensor:
    """Return the generator's loss; non_saturating is -log sigmoid(logits)."""
    if kind == "non_saturating":
        return functional.softplus(-logits_fake)
    return -logits_fake if kind == "hinge" else 0.5 * logits_fake.square()


def r1_penalty(logits_real: Tensor, real: Tensor) -> Tensor:
    """Return |d logits / d image|^2 of each real image, [B] (Mescheder et al. 2018, section 4.1).

    `real` [B, C, H, W] must require a gradient, and each logit may depend on its own image only.
    The penalty is differentiable.
    """
    (gradient,) = torch.autograd.grad(logits_real.sum(), real, create_graph=True)
    return gradient.square().flatten(1).sum(1)
