"""The approximate posterior q(z | x), its KL divergence from the prior, and the KL's weight.

Shapes: mu, log_var, noise and z [B, latent]; the prior is N(0, 1) in each dimension.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Posterior(NamedTuple):
    """The encoder's normal distribution q(z | x), independent in each dimension."""

    mu: Tensor
    log_var: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """Return z = mu + sigma noise (Kingma and Welling 2014)."""
        return self.mu + torch.exp(0.5 * self.log_var) * noise

    def kl(self) -> Tensor:
        """Return KL(q(z | x) || N(0, 1)) of each dimension, nats [B, latent]."""
        # expm1, since exp(log_var) - 1 cancels for unused latents.
        return 0.5 * (self.mu.square() + torch.expm1(self.log_var) - self.log_var)

    def log_ratio(self, noise: Tensor) -> Tensor:
        """Return log p(z) - log q(z | x) at z = `sample(noise)`, nats [B]; its mean is -KL."""
        z = self.sample(noise)
        return 0.5 * (noise.square() + self.log_var - z.square()).sum(1)


def apply_free_bits(kl: Tensor, free_bits: float) -> Tensor:
    """Return the KL [B, latent] clamped to `free_bits` nats per dimension and summed, nats [B].

    Below `free_bits` the gradient is 0, so the encoder is not pushed to encode less. Kingma et al.
    2016 clamp the mean over a minibatch; here each image is clamped, so the loss does not depend on
    micro-batches.
    """
    return kl.clamp(min=free_bits).sum(1)


def kl_weight(beta: float, images_seen: int | Tensor, warmup_images: int) -> float | Tensor:
    """Return the weight of the KL, which rises linearly to `beta` over `warmup_images`.

    Without warm-up many dimensions stay unused (Sonderby et al. 2016). A tensor `images_seen`,
    int64 [], gives a float64 [].
    """
    if not warmup_images:
        return beta
    if isinstance(images_seen, Tensor):
        # Division by a number is, on a GPU, multiplication by its reciprocal, rounded differently.
        seen = images_seen.double()
        return beta * (seen / torch.full_like(seen, warmup_images)).clamp(max=1)
    return beta * min(1.0, images_seen / warmup_images)
