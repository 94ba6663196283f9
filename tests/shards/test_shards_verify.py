"""`python -m shards.verify` names the first damaged shard."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dgm.common.errors import UserError
from shards.format import INDEX, fixed_layout, sha256_of
from shards.validate_samples import validate_samples
from shards.verify import verify


def resign(folder: Path) -> None:
    """Update the checksums of the index, so that only the check of samples finds damage."""
    index = json.loads((folder / INDEX).read_text())
    del index["checksum"]
    for shard in index["shards"]:
        shard["sha256"] = sha256_of(folder / shard["name"])
        shard["size"] = (folder / shard["name"]).stat().st_size
    (folder / INDEX).write_text(json.dumps(index))


@pytest.fixture(params=["npy", "png"])
def folder(request, images, write, tmp_path: Path) -> Path:
    """Return a folder of three good shards."""
    write(images(10), np.arange(10), shard_size=4, image_format=request.param)
    return tmp_path / "shards"


def test_good_shards_give_one_summary_line(start, folder: Path) -> None:
    process = start("verify", folder)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0 and stderr == ""
    size = sum(path.stat().st_size for path in folder.glob("*.tar"))
    assert stdout == f"10 images, 10 classes, 3 shards, {size} bytes: all good\n"


def test_missing_extra_and_short_shards_are_found(fails, folder: Path) -> None:
    (folder / "more.tar").write_bytes(b"")
    assert "more.tar is not in" in fails("verify", folder)
    (folder / "more.tar").unlink()
    path = folder / "train-00001.tar"
    path.write_bytes(path.read_bytes()[:-1])
    assert "train-00001.tar has" in fails("verify", folder)
    path.unlink()
    assert "train-00001.tar is missing" in fails("verify", folder)


def test_a_png_that_does_not_decode_is_found(images, write, tmp_path: Path) -> None:
    write(images(10), np.arange(10), shard_size=4, image_format="png")
    path = tmp_path / "shards" / "train-00001.tar"
    content = bytearray(path.read_bytes())
    content[1600:1700] = bytes(100)
    path.write_bytes(content)
    resign(tmp_path / "shards")
    with pytest.raises(UserError, match=r"train-00001.tar: sample 000000004"):
        verify(tmp_path / "shards")


@pytest.mark.parametrize(
    ("offset", "content"),
    [
        (0, b"9"),  # name of the label
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
def test_damage_in_any_header_is_found(
    images, write, tmp_path: Path, offset: int, content: bytes
) -> None:
    write(images(10), np.arange(10), shard_size=4)
    path = tmp_path / "shards" / "train-00001.tar"
    data = bytearray(path.read_bytes())
    data[2 * 5120 + offset : 2 * 5120 + offset + len(content)] = content
    path.write_bytes(data)
    resign(tmp_path / "shards")
    with pytest.raises(UserError, match=r"train-00001.tar is damaged at sample 000000006"):
        verify(tmp_path / "shards")


def test_data_after_the_last_sample_are_found(images, write, tmp_path: Path) -> None:
    write(images(10), np.arange(10))
    path = tmp_path / "shards" / "train-00000.tar"
    with pytest.raises(UserError, match="data after its last sample"):
        validate_samples(path, fixed_layout((32, 32, 3)), 0, 9, (32, 32, 3), 10)
    with pytest.raises(UserError, match="truncated"):
        validate_samples(path, fixed_layout((32, 32, 3)), 0, 99, (32, 32, 3), 10)
