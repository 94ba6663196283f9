"""DiffAugment against the official definition.

Source: Zhao et al. 2020, "Differentiable augmentation for data-efficient GAN training", and the
authors' DiffAugment_pytorch.py (github.com/mit-han-lab/data-efficient-gans).

Translation: by randint(-s, s + 1) with s = int(side * 0.125 + 0.5). Cutout: of size
c = int(side * 0.5 + 0.5), whose rows are clamp(offset - c // 2 + i, 0, side - 1) for i < c, with
offset of randint(0, side + (1 - c % 2)). Colour: brightness + (u - 0.5), then saturation around the
pixel's mean by 2 u, then contrast around the image's mean by u + 0.5.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from dgm.gan.diffaugment import _AUGMENTATIONS, augment
from dgm.rng import Draws

SIDES = [8, 9, 10, 11, 12, 20, 31, 32]


def every(count: int) -> Tensor:
    """Return numbers in [0, 1) of which each is in its own of `count` equal parts."""
    return ((torch.arange(count, dtype=torch.float64) + 0.5) / count)[:, None, None, None]


def official_cutouts(side: int) -> list[set[int]]:
    """Return the rows that are cut for every offset that the official code draws."""
    size = int(side * 0.5 + 0.5)
    offsets = range(side + (1 - size % 2))
    return [
        {min(max(offset - size // 2 + i, 0), side - 1) for i in range(size)} for offset in offsets
    ]


@pytest.mark.parametrize("side", SIDES)
def test_cutout_covers_the_official_rows_for_every_draw(side: int):
    expected = official_cutouts(side)
    down = every(len(expected))
    middle = torch.full_like(down, 0.5)
    ones = torch.ones(len(down), 1, side, side)
    rows = _AUGMENTATIONS["cutout"](ones, down, middle, middle)[:, 0] == 0
    assert [set(row.any(1).nonzero()[:, 0].tolist()) for row in rows] == expected
    columns = _AUGMENTATIONS["cutout"](ones, middle, down, middle)[:, 0] == 0
    assert [set(row.any(0).nonzero()[:, 0].tolist()) for row in columns] == expected


@pytest.mark.parametrize("side", [9, 32])
def test_rows_are_cut_as_often_as_the_official_definition_says(side: int):
    expected = official_cutouts(side)
    frequency = np.array([np.mean([row in cut for cut in expected]) for row in range(side)])
    if side == 32:
        assert frequency[0] == 9 / 33
    count, parts = 60_000, []
    for first in range(0, count, 10_000):
        draws = Draws.of(0, torch.arange(first, first + 10_000))
        made = augment(torch.ones(10_000, 1, side, side), ["cutout"], draws, "real")
        parts.append((made[:, 0] == 0).any(2))
    found = torch.cat(parts).double().mean(0).numpy()
    # Four standard errors of 60,000 draws are at most 0.008. Drawing 32 offsets instead of the
    # official 33 would change the first row by 0.009 (9 / 32 instead of 9 / 33).
    error = np.sqrt(frequency * (1 - frequency) / count)
    assert (np.abs(found - frequency) < 4 * error + 1e-12).all()


@pytest.mark.parametrize("side", SIDES)
def test_translation_shifts_by_the_official_pixels_for_every_draw(side: int):
    limit = int(side * 0.125 + 0.5)
    shifts = every(2 * limit + 1)
    middle = torch.full_like(shifts, 0.5)
    x = torch.arange(1.0, side * side + 1).reshape(1, 1, side, side).expand(len(shifts), -1, -1, -1)
    down = _AUGMENTATIONS["translation"](x, shifts, middle, middle)
    right = _AUGMENTATIONS["translation"](x, middle, shifts, middle)
    for row, shift in enumerate(range(-limit, limit + 1)):
        padded = torch.nn.functional.pad(x[0, 0], (0, 0, side, side))
        expected = padded[side - shift : 2 * side - shift]  # rows from outside are 0
        assert torch.equal(down[row, 0], expected)
        assert torch.equal(
            right[row, 0].T,
            torch.nn.functional.pad(x[0, 0].T, (0, 0, side, side))[side - shift : 2 * side - shift],
        )


def test_color_is_the_official_chain():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 3, 5, 7, generator=generator, dtype=torch.float64)
    chosen = torch.rand(3, 6, 1, 1, 1, generator=generator, dtype=torch.float64)
    expected = x + (chosen[0] - 0.5)
    pixel = expected.mean(1, keepdim=True)
    expected = (expected - pixel) * (chosen[1] * 2) + pixel
    image = expected.mean((1, 2, 3), keepdim=True)
    expected = (expected - image) * (chosen[2] + 0.5) + image
    torch.testing.assert_close(_AUGMENTATIONS["color"](x, *chosen), expected)


def test_shifts_are_equally_frequent():
    x = torch.zeros(20_000, 1, 12, 12)
    x[:, :, 6, 6] = 1
    made = augment(x, ["translation"], Draws.of(1, torch.arange(len(x))), "real")
    counts = torch.bincount(made.flatten(1).argmax(1) // 12 - 6 + 2, minlength=5)
    assert len(counts) == 5  # -2 to 2: int(12 * 0.125 + 0.5) = 2
    assert (counts - 4000).abs().max() < 4 * math.sqrt(20_000 * 0.2 * 0.8)
