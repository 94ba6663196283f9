"""Stored images as what networks take: flipped, scaled, dequantised."""

from __future__ import annotations

import torch
from torch import Tensor

from dgm.rng import Draws


def draw_mirrored(draws: Draws) -> Tensor:
    """Draw which images to mirror, each with probability 1/2: bool [B]."""
    return draws.bits("flip", 1)[0][:, 0] >= 2**31


def flip_images(images: Tensor, mirrored: Tensor) -> Tensor:
    """Mirror those of uint8 [B, H, W, C] that `mirrored` [B] says."""
    return torch.where(mirrored[:, None, None, None], images.flip(2), images)


def scale(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Map uint8 [B, H, W, C] to [B, C, H, W] with 0 at -1 and 255 at 1, channels_last."""
    return (images.to(dtype) * (1 / 127.5) - 1).permute(0, 3, 1, 2)


def dequantize(images: Tensor, draws: Draws, dtype: torch.dtype = torch.float32) -> Tensor:
    """Map uint8 [B, H, W, C] to [B, C, H, W] in [-1, 1), uniform within each grey level.

    A grey level is 1/128 wide. A density on these images bounds the mass of the stored ones
    (Theis et al. 2016, section 3.1): -log P <= -log p - D log(1/128), on average over the noise.
    """
    noise = draws.uniform("dequantize", tuple(images.shape[1:]), dtype)
    return ((images.to(dtype) + noise) * (1 / 128) - 1).permute(0, 3, 1, 2)
