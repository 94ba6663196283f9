"""Pixel maps between stored grey levels and network inputs, dequantization and flips."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dgm.rng import Draws


@dataclass(frozen=True)
class PixelMap:
    """Map of grey levels u = 0 ... 255 to x = (u + offset) / levels_per_unit - 1, and its inverse.

    Level u covers the bin of width 1 / levels_per_unit around its x. Stored images are uint8
    [B, H, W, C]; x is [B, C, H, W], channels_last.
    """

    levels_per_unit: float
    offset: float

    @property
    def bin_width(self) -> float:
        """Return the width of a grey level in x."""
        return 1 / self.levels_per_unit

    def scale(self, images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return x of stored images, [B, C, H, W]: the center of each grey level's bin."""
        return self.from_levels(images.to(dtype)).permute(0, 3, 1, 2)

    def dequantize(
        self, images: Tensor, draws: Draws, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Return stored images with uniform noise of one grey level, [B, C, H, W].

        In float32 about one number in 10^5 rounds up to the edge of its bin.

        A density p on these images bounds the mass P of the stored ones (Theis et al. 2016,
        section 3.1): -log P <= -log p - D log(bin_width), on average over the noise.
        """
        noise = draws.uniform("dequantize", tuple(images.shape[1:]), dtype)
        return self.dequantize_with(images.to(dtype), noise).permute(0, 3, 1, 2)

    def dequantize_with(self, levels: Tensor, noise: Tensor) -> Tensor:
        """Return (levels + offset + noise - 1/2) / levels_per_unit - 1; noise in [0, 1)."""
        edge = self.offset - 0.5  # distance of the bin's lower edge from the level
        return _affine(levels + noise if edge == 0 else levels + (noise + edge), self)

    def from_levels(self, levels: Tensor) -> Tensor:
        """Return x of grey levels, which need not be integers; any shape."""
        return _affine(levels if self.offset == 0 else levels + self.offset, self)

    def to_levels(self, x: Tensor) -> Tensor:
        """Return the grey level of x, clipped to [0, 255] but not rounded; any shape."""
        return ((x + 1) * self.levels_per_unit - self.offset).clamp(0, 255)

    def to_uint8(self, x: Tensor) -> Tensor:
        """Return the grey level whose bin contains x [B, C, H, W], or the nearest, [B, H, W, C].

        The inverse of `scale` and of `dequantize`.
        """
        levels = self.to_levels(x.float() if x.dtype.itemsize < 4 else x)
        return (levels + 0.5).floor().to(torch.uint8).permute(0, 2, 3, 1)

    def convert(self, x: Tensor, to: PixelMap) -> Tensor:
        """Return images x of this map as images of the map `to`; any shape."""
        return x if self == to else to.from_levels(self.to_levels(x))


def _affine(levels: Tensor, pixels: PixelMap) -> Tensor:
    return levels * pixels.bin_width - 1


STANDARD = PixelMap(127.5, 0.0)
"""Level 0 at -1 and 255 at 1; the outer halves of these two bins are outside [-1, 1]."""

DEQUANTIZED = PixelMap(128.0, 0.5)
"""256 bins that fill [-1, 1), for densities of uniformly dequantized images."""


def draw_flips(draws: Draws) -> Tensor:
    """Draw which images to mirror, with probability 1/2: bool [B]."""
    return draws.bits("flip", 1)[0][:, 0] >= 2**31


def flip_images(images: Tensor, flipped: Tensor) -> Tensor:
    """Mirror the images of uint8 [B, H, W, C] where `flipped`, bool [B]."""
    return torch.where(flipped[:, None, None, None], images.flip(2), images)
