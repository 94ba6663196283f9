"""What is known of an image's latent: q(z | x), its divergence from the prior, and their ratio.

Shapes: mu, log_var, noise and z [B, latent]; the prior is N(0, 1) in each dimension.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Posterior(NamedTuple):
    """The normal distribution q(z | x) that the encoder says, one dimension apart from another."""

    mu: Tensor
    log_var: Tensor

    def at(self, noise: Tensor) -> Tensor:
        """Give z = mu + sigma noise (Kingma and Welling 2014)."""
        return self.mu + torch.exp(0.5 * self.log_var) * noise

    def kl(self) -> Tensor:
        """Compute KL(q(z | x) || N(0, 1)) of each dimension, nats [B, latent]."""
        # expm1, as exp(log_var) - 1 would cancel where the latent is not used.
        return 0.5 * (self.mu.square() + torch.expm1(self.log_var) - self.log_var)

    def log_ratio(self, noise: Tensor) -> Tensor:
        """Compute log p(z) - log q(z | x) of z = `at(noise)`, nats [B]; on average -KL."""
        z = self.at(noise)
        return 0.5 * (noise.square() + self.log_var - z.square()).sum(1)


def with_free_bits(kl: Tensor, free_bits: float) -> Tensor:
    """Count at least `free_bits` nats for each dimension [B, latent]: nats [B].

    So no gradient presses a dimension to say less of an image than that. Kingma et al. 2016
    compare the mean over a minibatch with `free_bits`; here each image is compared by itself, so
    that the loss does not depend on how a batch is cut.
    """
    return kl.clamp(min=free_bits).sum(1)


def kl_weight(beta: float, images_seen: int | Tensor, warmup_images: int) -> float | Tensor:
    """Give the weight of the KL, which rises linearly to `beta` over `warmup_images`.

    If `images_seen` is a tensor, int64 [], so is the weight, float64 []. Sonderby et al. 2016 show
    that without such a rise many dimensions stay unused.
    """
    if not warmup_images:
        return beta
    if isinstance(images_seen, Tensor):
        # By a tensor, as a GPU multiplies by a number's reciprocal, which rounds differently.
        seen = images_seen.double()
        return beta * (seen / torch.full_like(seen, warmup_images)).clamp(max=1)
    return beta * min(1.0, images_seen / warmup_images)
