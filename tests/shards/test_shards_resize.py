"""Shards whose images are cropped and resized when they are decoded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tars import members, write_tar

from dgm.common.errors import UserError
from shards.build import build, ensure
from shards.reader import Shards, open_shards


def fitted(pixels: np.ndarray, side: int) -> np.ndarray:
    """Center-crop to squares and resize, bicubic, by Pillow alone."""
    found = []
    for image in pixels:
        height, width = image.shape[:2]
        least = min(height, width)
        box = ((width - least) / 2, (height - least) / 2, (width + least) / 2, (height + least) / 2)
        opened = Image.fromarray(image)
        found.append(np.asarray(opened.resize((side, side), Image.Resampling.BICUBIC, box)))
    return np.stack(found)


@pytest.fixture
def tar_of(tmp_path: Path):
    def make(pixels, extension: str, name: str = "other") -> Path:
        labels = (number % 2 for number in range(len(pixels)))
        return write_tar(tmp_path / name / "a.tar", members(pixels, labels, extension)).parent

    return make


@pytest.mark.parametrize("extension", ["png", "npy"])
def test_foreign_tars_are_resized(images, tar_of, extension: str) -> None:
    pixels = images(4, 24, 32)
    folder = tar_of(pixels, extension)
    whole = Shards(folder)
    small = [Shards(folder, side) for side in (8, 16)]
    assert whole.image_shape == (24, 32, 3)
    for side, shards in zip((8, 16), small, strict=True):
        assert shards.image_shape == (side, side, 3) and shards.index.settings == {"resize": side}
        assert np.array_equal(shards.images(np.arange(4)), fitted(pixels, side))
        assert shards.labels(np.arange(4)).tolist() == [0, 1, 0, 1]
        assert Shards(folder, side).folder == shards.folder
    # Copies of several sizes coexist.
    assert len({shards.folder for shards in (whole, *small)}) == 3
    assert all((shards.folder).is_dir() for shards in (whole, *small))


def test_images_of_several_sizes_are_resized(images, tar_of) -> None:
    pixels = [images(1, 20 + n, 30)[0] for n in range(3)]
    folder = tar_of(pixels, "png")
    with pytest.raises(UserError, match=r"is 30 x 21 but .* 30 x 20; give data\.resize"):
        Shards(folder)
    assert [path.name for path in folder.iterdir()] == ["a.tar"]
    found = Shards(folder, 16).images(np.arange(3))
    assert np.array_equal(found, np.concatenate([fitted(image[None], 16) for image in pixels]))


def test_shards_of_the_right_size_are_not_resized(images, write, tar_of, tmp_path: Path) -> None:
    own = write(images(4), np.arange(4))
    assert Shards(own, 32).folder == own
    folder = tar_of(images(4), "npy")
    assert Shards(folder, 32).folder == folder
    decoded = Shards(tar_of(images(4), "png", "png"))
    assert Shards(tmp_path / "png", 32).folder == decoded.folder


def test_own_shards_and_remote_ones_are_resized(images, write) -> None:
    pixels = images(4)
    folder = write(pixels, np.arange(4))
    tar = folder / "train-00000.tar"
    for where in (folder, tar, f"pipe:cat {tar}"):
        path = ensure("shapes", where, "test", resize=16)
        shards = open_shards(path, 16)
        assert np.array_equal(shards.images(np.arange(4)), fitted(pixels, 16))
        assert shards.labels(np.arange(4)).tolist() == [0, 1, 2, 3]
    assert Shards(folder).image_shape == (32, 32, 3)
    assert Shards(folder, 16).classes == Shards(folder).classes


def test_a_folder_and_tars_of_its_images_give_the_same_bytes(
    class_tree, images, tar_of, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = class_tree(tmp_path / "tree")
    index = build(f"folder:{tree}", "train", tmp_path / "built", resize=16, progress=False)
    files = sorted(tree.rglob("*.png"))
    folder = tar_of([np.asarray(Image.open(path)) for path in files], "png")
    own = Shards(tmp_path / "built")
    assert index.settings == {"resize": 16}
    assert np.array_equal(own.images(np.arange(6)), Shards(folder, 16).images(np.arange(6)))
