"""`python -m shards.verify` names the first damaged shard."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dgm.common.errors import UserError
from shards.decode_cache import encoded_source
from shards.format import INDEX, fixed_layout, load_index
from shards.validate_samples import validate_samples
from shards.verify import verify

SHAPE = (32, 32, 3)


@pytest.fixture(params=["npy", "png"])
def folder(request, images, write) -> Path:
    """Return a folder of three good shards."""
    return write(images(10), np.arange(10), shard_size=4, image_format=request.param)


def test_good_shards_give_one_summary_line(run_script, folder: Path) -> None:
    done = run_script("-m", "shards.verify", folder)
    assert done.code == 0 and done.stderr == ""
    size = sum(path.stat().st_size for path in folder.glob("*.tar"))
    assert done.stdout == f"10 images, 10 classes, 3 shards, {size} bytes: all good\n"


def test_missing_extra_and_short_shards_are_found(folder: Path) -> None:
    path = folder / "train-00001.tar"
    (folder / "more.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"more\.tar is not in"):
        verify(folder)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"train-00001\.tar has \d+ bytes"):
        verify(folder)
    path.unlink()
    with pytest.raises(UserError, match=r"train-00001\.tar is missing"):
        verify(folder)


def test_a_png_that_does_not_decode_is_found(images, write) -> None:
    folder = write(images(10), np.arange(10), shard_size=4, image_format="png")
    with (folder / "train-00001.tar").open("r+b") as tar:
        tar.seek(1600)
        tar.write(bytes(100))
    with pytest.raises(UserError, match=r"train-00001.tar: sample 000000004"):
        list(encoded_source(folder, load_index(folder / INDEX)).samples())


@pytest.mark.parametrize(
    ("offset", "content"),
    [
        (0, b"9"),  # tar header of the label: name
        (100, b"1"),  # mode
        (124, b"1"),  # size of the label
        (148, b"1"),  # checksum
        (156, b"5"),  # type
        (512, b"x"),  # label
        (512, b"99"),  # a label that no class has
        (512, b"\0"),
        (1024, b"9"),  # name of the image
        (1024 + 124, b"1"),  # size of the image
        (1536, b"x"),  # npy header
        (1600, b"3"),
    ],
)
def test_damage_in_any_header_is_found(images, write, offset: int, content: bytes) -> None:
    path = write(images(10), np.arange(10), shard_size=4) / "train-00001.tar"
    with path.open("r+b") as tar:
        tar.seek(2 * 5120 + offset)
        tar.write(content)
    with pytest.raises(UserError, match=r"train-00001.tar is damaged at sample 000000006"):
        validate_samples(path, fixed_layout(SHAPE), 4, 4, SHAPE, 10)


@pytest.mark.parametrize(("count", "message"), [(9, "data after its last"), (99, "truncated")])
def test_a_tar_of_another_length_is_found(images, write, count: int, message: str) -> None:
    path = write(images(10), np.arange(10)) / "train-00000.tar"
    with pytest.raises(UserError, match=message):
        validate_samples(path, fixed_layout(SHAPE), 0, count, SHAPE, 10)
