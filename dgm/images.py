"""Image output: uint8 arrays, PNG grids, and `.npz` files for external evaluators."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from dgm.common.atomic_io import replacing
from dgm.preprocessing import PixelMap

MAX_GRID_SIDE = 4096
"""Maximum side of a grid in pixels, which viewers and browsers can still open."""
SCALE, GAP = 2, 2
"""Enlargement of the images of a grid, and pixels between them."""


def to_uint8(images: Tensor, pixels: PixelMap) -> np.ndarray:
    """Convert images [N, C, H, W], as mapped by `pixels`, to stored ones, uint8 [N, H, W, C]."""
    return pixels.to_uint8(images).cpu().numpy()


def grid(images: np.ndarray, columns: int) -> np.ndarray:
    """Return images, uint8 [N, H, W, C], laid out row by row on white, enlarged by `SCALE`."""
    count, height, width, channels = images.shape
    rows = -(-count // columns)
    images = images.repeat(SCALE, axis=1).repeat(SCALE, axis=2)
    height, width = height * SCALE + GAP, width * SCALE + GAP
    sheet = np.full((rows * height + GAP, columns * width + GAP, channels), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = GAP + i // columns * height, GAP + i % columns * width
        sheet[top : top + height - GAP, left : left + width - GAP] = image
    return sheet


def fit_grid(rows: int, columns: int, height: int, width: int) -> tuple[int, int]:
    """Return the number of rows and columns that fit a `grid` of at most `MAX_GRID_SIDE`."""
    fitting = ((MAX_GRID_SIDE - GAP) // (side * SCALE + GAP) for side in (height, width))
    max_rows, max_columns = (max(1, count) for count in fitting)
    return min(rows, max_rows), min(columns, max_columns)


def evenly_spaced(count: int, num_chosen: int) -> list[int]:
    """Return `num_chosen` of the numbers 0 to `count` - 1, evenly spaced."""
    return [i * count // num_chosen for i in range(num_chosen)]


def save_png(path: Path, image: np.ndarray) -> None:
    """Write uint8 [H, W, C] atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(partial, "PNG")


def save_npz(path: Path, images: np.ndarray, labels: np.ndarray | None = None) -> None:
    """Write `arr_0` uint8 [N, H, W, C] and, where given, `arr_1` labels, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, open(partial, "wb") as file:
        np.savez(file, *((images,) if labels is None else (images, labels)))
