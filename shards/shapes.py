"""The built-in data set: ten classes of coloured shapes, which needs no download.

Each image is a function of (seed, split, index) only: a bright shape on a dark background, with
random position, size, angle and colours; drawn at 128 x 128 and averaged down to 32 x 32. Shapes
are mirror-symmetric and nearly upright, so that a small model can learn them within minutes.
"""

from __future__ import annotations

import colorsys
from collections.abc import Iterator
from functools import cache

import numpy as np

SIDE = 32
_SCALE = 4
_TURN = 2 * np.pi
_MAX_TILT = _TURN / 24
_SPLITS = ("train", "test")

CLASSES = (
    "circle", "square", "triangle", "star", "cross", "ring", "heart", "crescent", "arrow", "bars",
)  # fmt: skip
NUM_IMAGES = {"train": 7_000, "test": 1_000}


def render_all(split: str, seed: int = 0) -> Iterator[tuple[np.ndarray, int]]:
    """Yield every (image, label) of a split; label = index % 10, so classes are balanced."""
    for index in range(NUM_IMAGES[split]):
        yield render(split, index, seed), index % len(CLASSES)


def render(split: str, index: int, seed: int = 0) -> np.ndarray:
    """Draw one image: uint8 [32, 32, 3]; its class is CLASSES[index % 10]."""
    # Counter-based, and only plain doubles in [0, 1): the same on every platform.
    key = np.array([seed, index * len(_SPLITS) + _SPLITS.index(split)], np.uint64)
    draws = np.random.Generator(np.random.Philox(key=key)).random(9)
    radius = 8.5 + 5.0 * draws[0]  # pixels of the 32 x 32 image
    center = SIDE / 2 + (SIDE / 2 - radius) * (2 * draws[1:3] - 1)
    angle = _MAX_TILT * (2 * draws[3] - 1)
    coverage = _coverage(CLASSES[index % len(CLASSES)], radius, center, angle)
    bright = colorsys.hsv_to_rgb(draws[4], 0.4 + 0.6 * draws[5], 0.75 + 0.25 * draws[6])
    dark = colorsys.hsv_to_rgb(draws[7], 0.6, 0.05 + 0.2 * draws[8])
    colour = coverage * np.array(bright) + (1 - coverage) * np.array(dark)
    return np.round(255 * colour).astype(np.uint8)


def _coverage(name: str, radius: float, center: np.ndarray, angle: float) -> np.ndarray:
    """Return the fraction of each pixel that the shape covers: [32, 32, 1] in [0, 1]."""
    from PIL import Image, ImageDraw

    image = Image.new("L", (SIDE * _SCALE, SIDE * _SCALE))
    draw = ImageDraw.Draw(image)
    cos, sin = np.cos(angle), np.sin(angle)
    rotation = np.array([[cos, sin], [-sin, cos]])
    for points, fill in _outlines()[name]:
        placed = _SCALE * (radius * points @ rotation + center)
        draw.polygon([(float(x), float(y)) for x, y in placed], fill=fill)
    blocks = np.asarray(image, np.float64).reshape(SIDE, _SCALE, SIDE, _SCALE)
    return blocks.mean(axis=(1, 3))[:, :, None] / 255


@cache
def _outlines() -> dict[str, list[tuple[np.ndarray, int]]]:
    """Return polygons [K, 2] inside the unit circle, drawn in order with fill 255 or 0 (a hole)."""
    circle = _polygon(64)
    star = _polygon(10)
    star[1::2] *= 0.42
    arm = 0.3
    bar = np.array([(-0.74, -0.13), (0.74, -0.13), (0.74, 0.13), (-0.74, 0.13)])
    around = np.linspace(0, _TURN, 64, endpoint=False)
    heart_x = 16 * np.sin(around) ** 3
    heart_y = -13 * np.cos(around) + 5 * np.cos(2 * around) + 2 * np.cos(3 * around)
    heart_y += np.cos(4 * around)
    heart = np.stack([heart_x, heart_y], axis=1)
    arrow = [(0.0, -1.0), (0.8, -0.1), (0.25, -0.1), (0.25, 0.95)]
    arrow += [(-x, y) for x, y in reversed(arrow[1:])]
    return {
        "circle": [(0.9 * circle, 255)],
        "square": [(_polygon(4, _TURN / 8), 255)],
        "triangle": [(_polygon(3), 255)],
        "star": [(star, 255)],
        "cross": [
            (np.array([(-0.95, -arm), (0.95, -arm), (0.95, arm), (-0.95, arm)]), 255),
            (np.array([(-arm, -0.95), (arm, -0.95), (arm, 0.95), (-arm, 0.95)]), 255),
        ],
        "ring": [(circle, 255), (0.58 * circle, 0)],
        "heart": [(heart / 17.0, 255)],
        "crescent": [(circle, 255), (0.85 * circle + np.array([0.0, -0.5]), 0)],
        "arrow": [(np.array(arrow), 255)],
        "bars": [(bar + np.array([0.0, y]), 255) for y in (-0.54, 0.0, 0.54)],
    }


def _polygon(corners: int, start: float = -_TURN / 4) -> np.ndarray:
    """Return corners on the unit circle, the first at `start`: at the top, as y points down."""
    angles = start + np.linspace(0, _TURN, corners, endpoint=False)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)
