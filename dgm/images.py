"""Images out: uint8 arrays, PNG grids for eyes, `.npz` files for other people's evaluators."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from dgm.common.atomic_io import replacing
from dgm.preprocessing import PixelMap

LARGEST_GRID = 4096
"""Pixels on a side of a grid, at most: what viewers and browsers open."""


def to_uint8(images: Tensor, pixels: PixelMap) -> np.ndarray:
    """Return images [N, C, H, W] of a pixel map as they are stored, uint8 [N, H, W, C]."""
    return pixels.to_uint8(images).cpu().numpy()


def grid(images: np.ndarray, columns: int, scale: int = 2, gap: int = 2) -> np.ndarray:
    """Lay out uint8 [N, H, W, C] row by row, each pixel `scale` wide, on white."""
    count, height, width, channels = images.shape
    rows = -(-count // columns)
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    height, width = height * scale + gap, width * scale + gap
    sheet = np.full((rows * height + gap, columns * width + gap, channels), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = gap + i // columns * height, gap + i % columns * width
        sheet[top : top + height - gap, left : left + width - gap] = image
    return sheet


def fit_grid(
    rows: int, columns: int, height: int, width: int, scale: int = 2, gap: int = 2
) -> tuple[int, int]:
    """Return how many rows and columns of images make a `grid` of `LARGEST_GRID` at most."""
    fitting = ((LARGEST_GRID - gap) // (side * scale + gap) for side in (height, width))
    most_rows, most_columns = (max(1, count) for count in fitting)
    return min(rows, most_rows), min(columns, most_columns)


def evenly(count: int, shown: int) -> list[int]:
    """Return `shown` of the numbers 0 to `count` - 1, evenly spaced."""
    return [i * count // shown for i in range(shown)]


def save_png(path: Path, image: np.ndarray) -> None:
    """Write uint8 [H, W, C] whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(partial, "PNG")


def save_npz(path: Path, images: np.ndarray, labels: np.ndarray | None = None) -> None:
    """Write `arr_0` uint8 [N, H, W, C] and, where given, `arr_1` labels, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, open(partial, "wb") as file:
        np.savez(file, *((images,) if labels is None else (images, labels)))
