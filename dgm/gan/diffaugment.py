"""DiffAugment: differentiable augmentation of real and generated images.

Zhao et al. 2020, "Differentiable augmentation for data-efficient GAN training", section 3, with
the ranges of the authors' code (DiffAugment_pytorch.py of mit-han-lab/data-efficient-gans), drawn
per image. An augmentation applied with probability 1 can leak into the generated images (grey stays
grey under any change of saturation); at a lower probability it does not (Karras et al. 2020,
"Training generative adversarial networks with limited data", section 2.2).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dgm.rng import Draws

Augmentation = Literal["color", "translation", "cutout"]


def augment(
    x: Tensor, kinds: list[Augmentation], draws: Draws, purpose: str, probability: float = 1.0
) -> Tensor:
    """Return augmented images [B, C, H, W] in [-1, 1]; each kind is applied with `probability`.

    `purpose` is that of the draws, which differ for real and generated images.
    """
    for kind in kinds:
        uniform = draws.uniform(f"{purpose}/{kind}", (3,), x.dtype)
        changed = _AUGMENTATIONS[kind](x, *uniform[:, :, None, None, None].unbind(1))
        if probability < 1:
            hit = draws.uniform(f"{purpose}/{kind}/hit", (1, 1, 1), x.dtype) < probability
            changed = torch.where(hit, changed, x)
        x = changed
    return x


def _color(x: Tensor, brightness: Tensor, saturation: Tensor, contrast: Tensor) -> Tensor:
    """Shift brightness by -0.5 to 0.5, scale saturation by 0 to 2 and contrast by 0.5 to 1.5."""
    x = x + (brightness - 0.5)
    grey = x.mean(1, keepdim=True)
    x = (x - grey) * (2 * saturation) + grey
    mean = x.mean((1, 2, 3), keepdim=True)
    return (x - mean) * (contrast + 0.5) + mean


def _translation(x: Tensor, down: Tensor, right: Tensor, _: Tensor) -> Tensor:
    """Shift by up to int(side / 8 + 0.5) pixels in each direction; pad with 0."""
    batch, channels, height, width = x.shape
    rows = _positions(x, height) - _shift(down, _rounded(height, 8))
    columns = _positions(x, width) - _shift(right, _rounded(width, 8))
    inside_rows = (rows >= 0) & (rows < height)
    inside_columns = (columns >= 0) & (columns < width)
    index = rows.clamp(0, height - 1)[:, :, None] * width + columns.clamp(0, width - 1)[:, None]
    flat = x.flatten(2).gather(2, index.reshape(batch, 1, -1).expand(-1, channels, -1))
    return flat.reshape(x.shape) * (inside_rows[:, :, None] & inside_columns[:, None])[:, None]


def _cutout(x: Tensor, down: Tensor, right: Tensor, _: Tensor) -> Tensor:
    """Set a square of side int(side / 2 + 0.5) to 0, clipped to the image."""
    cut_rows, cut_columns = _cut(x, down, x.shape[2]), _cut(x, right, x.shape[3])
    return x * ~(cut_rows[:, :, None] & cut_columns[:, None])[:, None]


def _cut(x: Tensor, uniform: Tensor, side: int) -> Tensor:
    """Return which rows (or columns) the cutout covers, [B, side].

    Its center is uniform over the side + 1 edges between pixels if its size is even, and over the
    `side` pixels if it is odd: the official randint(0, side + (1 - size % 2)).
    """
    size = _rounded(side, 2)
    first = _integer(uniform, side + 1 - size % 2) - size // 2
    positions = _positions(x, side)
    return (positions >= first) & (positions < first + size)


def _positions(x: Tensor, side: int) -> Tensor:
    return torch.arange(side, device=x.device)[None, :]


def _rounded(side: int, parts: int) -> int:
    """Return int(side / parts + 0.5), a half rounded up."""
    return int(side / parts + 0.5)


def _shift(uniform: Tensor, limit: int) -> Tensor:
    """Map numbers in [0, 1) to integers from -limit to limit, [B, 1]."""
    return _integer(uniform, 2 * limit + 1) - limit


def _integer(uniform: Tensor, high: int) -> Tensor:
    """Map numbers in [0, 1) to integers in [0, high), [B, 1]."""
    return (uniform.flatten(1) * high).floor().long()


_AUGMENTATIONS = {"color": _color, "translation": _translation, "cutout": _cutout}
