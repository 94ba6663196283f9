"""The built-in shapes."""

from __future__ import annotations

import numpy as np
import pytest

from shards.shapes import CLASSES, NUM_IMAGES, _coverage, render

UPRIGHT = (12.0, np.array([16.0, 16.0]), 0.0)  # radius, center, angle


@pytest.mark.parametrize("name", CLASSES)
def test_an_upright_shape_is_its_own_mirror_image(name: str) -> None:
    found = _coverage(name, *UPRIGHT)
    # Polygons are filled a quarter of a pixel wider on one side.
    assert np.abs(found - found[:, ::-1]).mean() < 0.02
    radius, center, _ = UPRIGHT
    if name not in ("circle", "ring"):  # which are symmetric under rotation
        turned = _coverage(name, radius, center, 0.5)
        assert np.abs(turned - turned[:, ::-1]).mean() > 0.03


def test_classes_differ() -> None:
    drawn = [_coverage(name, *UPRIGHT) for name in CLASSES]
    for i, one in enumerate(drawn):
        for other in drawn[:i]:
            assert np.abs(one - other).mean() > 0.02


def test_an_image_depends_only_on_seed_split_and_index() -> None:
    assert np.array_equal(render("train", 3), render("train", 3))
    others = [render("train", 13), render("test", 3), render("train", 3, seed=1)]
    assert not any(np.array_equal(render("train", 3), other) for other in others)


def test_shapes_are_bright_on_dark_and_inside_the_image() -> None:
    for index in range(0, NUM_IMAGES["test"], 7):
        image = render("test", index).max(axis=2)
        border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
        assert image.max() > 180
        assert np.median(border) < 70
