"""DiffAugment: the same kinds of changes to real and generated images, with gradients through.

Zhao et al. 2020, "Differentiable augmentation for data-efficient GAN training", section 3. Every
image draws changes of its own. A change made to every image can leak into the generated ones (what
is grey stays so under any change of saturation); one that leaves enough of them alone does not
(Karras et al. 2020, "Training generative adversarial networks with limited data", section 2.2).
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
    """Change images [B, C, H, W] in [-1, 1], each kind with its own probability.

    `purpose` tells real from generated draws.
    """
    for kind in kinds:
        chosen = draws.uniform(f"{purpose}/{kind}", (3,), x.dtype)
        changed = _CHANGES[kind](x, *chosen[:, :, None, None, None].unbind(1))
        if probability < 1:
            hit = draws.uniform(f"{purpose}/{kind}/hit", (1, 1, 1), x.dtype) < probability
            changed = torch.where(hit, changed, x)
        x = changed
    return x


def _color(x: Tensor, brightness: Tensor, saturation: Tensor, contrast: Tensor) -> Tensor:
    """Shift all by -0.5 to 0.5, scale colours by 0 to 2 and contrast by 0.5 to 1.5."""
    x = x + (brightness - 0.5)
    grey = x.mean(1, keepdim=True)
    x = (x - grey) * (2 * saturation) + grey
    mean = x.mean((1, 2, 3), keepdim=True)
    return (x - mean) * (contrast + 0.5) + mean


def _translation(x: Tensor, down: Tensor, right: Tensor, _: Tensor) -> Tensor:
    """Move by up to an eighth of the side; what comes in is 0."""
    batch, channels, height, width = x.shape
    rows = _places(x, height) - _whole(down, height // 8)
    columns = _places(x, width) - _whole(right, width // 8)
    inside_rows = (rows >= 0) & (rows < height)
    inside_columns = (columns >= 0) & (columns < width)
    index = rows.clamp(0, height - 1)[:, :, None] * width + columns.clamp(0, width - 1)[:, None]
    flat = x.flatten(2).gather(2, index.reshape(batch, 1, -1).expand(-1, channels, -1))
    return flat.reshape(x.shape) * (inside_rows[:, :, None] & inside_columns[:, None])[:, None]


def _cutout(x: Tensor, down: Tensor, right: Tensor, _: Tensor) -> Tensor:
    """Set a square of half the side to 0; its middle lies anywhere in the image."""
    height, width = x.shape[2:]
    rows = _places(x, height) - _anywhere(down, height) + height // 4
    columns = _places(x, width) - _anywhere(right, width) + width // 4
    cut_rows = (rows >= 0) & (rows < height // 2)
    cut_columns = (columns >= 0) & (columns < width // 2)
    return x * ~(cut_rows[:, :, None] & cut_columns[:, None])[:, None]


def _places(x: Tensor, side: int) -> Tensor:
    return torch.arange(side, device=x.device)[None, :]


def _whole(chosen: Tensor, most: int) -> Tensor:
    """Turn numbers in [0, 1) into whole ones from -most to most, [B, 1]."""
    return (chosen.flatten(1) * (2 * most + 1)).floor().long() - most


def _anywhere(chosen: Tensor, side: int) -> Tensor:
    return (chosen.flatten(1) * side).floor().long()


_CHANGES = {"color": _color, "translation": _translation, "cutout": _cutout}
