"""Blocks that several families use."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from dgm.rng import Draws


def group_norm(channels: int) -> nn.GroupNorm:
    """Make a GroupNorm of at most 32 groups with at least 4 channels each, where they divide."""
    groups = next(g for g in range(min(32, max(1, channels // 4)), 0, -1) if channels % g == 0)
    return nn.GroupNorm(groups, channels, eps=1e-6)


def timestep_embedding(t: Tensor, channels: int, max_period: float = 10_000.0) -> Tensor:
    """Embed t [B] in sines and cosines, float32 [B, channels] (Vaswani et al. 2017, 3.5)."""
    half = channels // 2
    exponent = torch.arange(half, dtype=torch.float32, device=t.device) / max(half - 1, 1)
    angles = t.to(torch.float32)[:, None] * torch.exp(-math.log(max_period) * exponent)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def keyed_dropout(x: Tensor, drop: float, draws: Draws | None, purpose: str) -> Tensor:
    """Drop elements of [B, C, H, W] by counter-based draws, so that no rank or batch size shows."""
    if draws is None or drop == 0:
        return x
    _, channels, height, width = x.shape
    keep = draws.keep_mask(purpose, (height, width, channels), drop).permute(0, 3, 1, 2)
    return torch.where(keep, x * (1 / (1 - drop)), torch.zeros((), dtype=x.dtype, device=x.device))


def zeroed(layer: nn.Conv2d) -> nn.Conv2d:
    """Let a convolution output zero at first, so that its block begins as the identity.

    All other layers keep torch's initialisation: it makes weights smaller than DDPM's variance
    scaling, so that steps of Adam change them faster, and small nets learn in a fraction of the
    steps.
    """
    nn.init.zeros_(layer.weight)
    assert layer.bias is not None, "layers here have a bias"
    nn.init.zeros_(layer.bias)
    return layer


class Attention(nn.Module):
    """Attend over the places of an image: [B, C, H, W] to the same, with a residual."""

    def __init__(self, channels: int, num_heads: int = 1):
        """Prepare `num_heads` heads of channels / num_heads each."""
        super().__init__()
        self.num_heads = num_heads
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Give x plus what attention adds to it."""
        batch, channels, height, width = x.shape
        # In channels_last the permuted view is [B, places, 3 C] without a copy.
        qkv = self.qkv(self.norm(x)).permute(0, 2, 3, 1).reshape(batch, height * width, 3, -1)
        query, key, value = (
            part.reshape(batch, height * width, self.num_heads, -1).transpose(1, 2)
            for part in qkv.unbind(2)
        )
        h = functional.scaled_dot_product_attention(query, key, value)
        h = h.transpose(1, 2).reshape(batch, height, width, channels).permute(0, 3, 1, 2)
        return x + self.out(h)
