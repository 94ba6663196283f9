"""Image output: grey levels, grids and files."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dgm.images import (
    GAP,
    MAX_GRID_SIDE,
    SCALE,
    evenly_spaced,
    fit_grid,
    grid,
    save_npz,
    save_png,
    to_uint8,
)
from dgm.preprocessing import STANDARD
from dgm.training.sampling import grid_classes


def test_images_are_clipped_and_channels_go_last():
    x = torch.full((2, 3, 4, 5), -7.0)
    x[1, 2, 3, 4] = 7.0
    made = to_uint8(x, STANDARD)
    assert made.shape == (2, 4, 5, 3) and made.dtype == np.uint8
    assert np.argwhere(made).tolist() == [[1, 3, 4, 2]] and made.max() == 255


def test_a_grid_shows_images_row_by_row_enlarged_on_white():
    images = np.random.default_rng(0).integers(0, 255, (5, 2, 3, 3), dtype=np.uint8)
    sheet = grid(images, columns=3)
    height, width = 2 * SCALE + GAP, 3 * SCALE + GAP
    expected = np.full((2 * height + GAP, 3 * width + GAP, 3), 255, np.uint8)
    for i, image in enumerate(images):
        for row, column in np.ndindex(2 * SCALE, 3 * SCALE):
            at = GAP + i // 3 * height + row, GAP + i % 3 * width + column
            expected[at] = image[row // SCALE, column // SCALE]
    assert np.array_equal(sheet, expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_png_holds_the_pixels(tmp_path: Path, channels: int):
    image = np.random.default_rng(0).integers(0, 256, (5, 7, channels), dtype=np.uint8)
    save_png(tmp_path / "deep" / "one.png", image)
    read = np.asarray(Image.open(tmp_path / "deep" / "one.png")).reshape(image.shape)
    assert np.array_equal(read, image)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["one.png"]


def test_npz_holds_arrays_for_other_evaluators(tmp_path: Path):
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    labels = np.arange(4)
    save_npz(tmp_path / "with.npz", images, labels)
    save_npz(tmp_path / "without.npz", images)
    with np.load(tmp_path / "with.npz") as read:
        assert sorted(read) == ["arr_0", "arr_1"]
        assert read["arr_0"].dtype == np.uint8
        assert np.array_equal(read["arr_0"], images) and np.array_equal(read["arr_1"], labels)
    with np.load(tmp_path / "without.npz") as read:
        assert sorted(read) == ["arr_0"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["with.npz", "without.npz"]


@pytest.mark.parametrize("side", [8, 32, 64, 256, 3000])
def test_grids_have_a_maximum_size(side: int):
    rows, columns = fit_grid(10_000, 10_000, side, side)
    assert rows == columns >= 1
    step = side * SCALE + GAP
    assert rows * step + GAP <= MAX_GRID_SIDE or rows == 1
    assert (rows + 1) * step + GAP > MAX_GRID_SIDE  # and not smaller than necessary
    assert fit_grid(3, 4, 32, 32) == (3, 4)


def test_classes_that_are_shown_are_evenly_spaced():
    assert evenly_spaced(10, 10) == list(range(10)) and evenly_spaced(10, 3) == [0, 3, 6]
    classes, columns = grid_classes(1000, 100, 32, 32)
    assert len(classes) == columns == 62 and classes[0] == 0 and max(classes) < 1000
    assert {b - a for a, b in itertools.pairwise(classes)} <= {16, 17}
    assert grid_classes(10, 10, 32, 32) == (list(range(10)), 10)
