"""Reading by global index, in place."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dgm.common.errors import UserError
from shards.format import INDEX, parse_labels
from shards.reader import Shards, open_shards

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("shard_size", [100, 30, 7, 1])
def test_reader_equals_source_for_random_indices(
    images, write, tmp_path: Path, shard_size: int
) -> None:
    pixels, labels = images(100), np.random.default_rng(1).integers(0, 10, 100)
    write(pixels, labels, shard_size=shard_size)
    shards = Shards(tmp_path / "shards")
    assert len(shards) == 100 and shards.num_classes == 10
    index = np.random.default_rng(2).integers(0, 100, 500)
    found, numbers = shards.images(index), shards.labels(index)
    assert np.array_equal(found, pixels[index]) and np.array_equal(numbers, labels[index])
    assert found.dtype == np.uint8 and found.flags.c_contiguous and found.flags.writeable
    assert numbers.dtype == np.int64
    assert np.array_equal(shards.labels(index), numbers)  # the second time, from memory
    assert np.array_equal(shards.images(index.astype(np.uint64)), found)


def test_labels_of_many_digits_keep_the_stride(images, write, tmp_path: Path) -> None:
    labels = np.array([0, 9, 10, 99, 100, 999, 1000, 1233])
    write(images(8), labels, classes=1234)
    assert Shards(tmp_path / "shards").labels(np.arange(8)).tolist() == labels.tolist()


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 99_999), min_size=1), st.sampled_from([b"\0", b"\n", b" "]))
def test_labels_are_parsed_up_to_the_first_other_byte(labels: list[int], end: bytes) -> None:
    text = b"".join((b"%d" % label + end * 5)[:5] for label in labels)
    digits = np.frombuffer(text, np.uint8).reshape(-1, 5)
    assert parse_labels(digits).tolist() == labels


def test_index_out_of_range_raises_index_error(images, write, tmp_path: Path) -> None:
    write(images(10), np.arange(10), shard_size=4)
    shards = Shards(tmp_path / "shards")
    for bad in ([0, 10], [-1], [2**40]):
        for read in (shards.images, shards.labels):
            with pytest.raises(IndexError, match=f"image {bad[-1]}"):
                read(np.array(bad))
    for wrong in (np.zeros(2), np.zeros((2, 2), int)):
        with pytest.raises(IndexError, match="must be integers"):
            shards.images(wrong)


@pytest.mark.parametrize("shard_size", [100, 4])
def test_an_empty_batch_is_an_empty_array(images, write, tmp_path: Path, shard_size) -> None:
    write(images(10), np.arange(10), shard_size=shard_size)
    shards = Shards(tmp_path / "shards")
    assert shards.images(np.array([], np.int64)).shape == (0, 32, 32, 3)
    assert shards.labels(np.array([], np.int64)).shape == (0,)


def test_a_pickled_reader_contains_no_pixels(images, write, tmp_path: Path) -> None:
    pixels = images(50)
    write(pixels, np.zeros(50, int))
    content = pickle.dumps(Shards(tmp_path / "shards"))
    assert len(content) < 1000
    assert np.array_equal(pickle.loads(content).images(np.arange(50)), pixels)


def test_truncated_or_missing_shard_is_refused(images, write, tmp_path: Path) -> None:
    write(images(10), np.arange(10), shard_size=4)
    path = tmp_path / "shards" / "train-00001.tar"
    path.write_bytes(path.read_bytes()[:-600])
    with pytest.raises(UserError, match=r"train-00001.tar has \d+ bytes"):
        Shards(tmp_path / "shards")
    path.unlink()
    with pytest.raises(UserError, match=r"train-00001.tar is missing"):
        Shards(tmp_path / "shards")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("version", 2, "version 2"),
        ("shards", [], "damaged"),
        ("total", 11, "total 11"),
        ("image_shape", [32, 32], "damaged"),
        ("classes", None, "damaged"),
        ("layout", {"stride": 5120, "label_offset": 512, "pixel_offset": 9999}, "this layout"),
        ("layout", {"stride": 9999, "label_offset": 512, "pixel_offset": 1664}, "this layout"),
    ],
)
def test_a_bad_index_is_refused(images, write, tmp_path: Path, key, value, message) -> None:
    write(images(10), np.arange(10))
    path = tmp_path / "shards" / INDEX
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(UserError, match=message):
        Shards(tmp_path / "shards")


def test_an_index_cannot_name_files_outside_its_folder(images, write, tmp_path: Path) -> None:
    write(images(10), np.arange(10))
    path = tmp_path / "shards" / INDEX
    path.write_text(path.read_text().replace("train-00000.tar", "../train-00000.tar"))
    with pytest.raises(UserError, match="not a plain file name"):
        Shards(tmp_path / "shards")


def test_folder_without_shards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no shards"):
        Shards(tmp_path)
    with pytest.raises(UserError, match="do not exist"):
        Shards(tmp_path / "none")


def test_one_tar_of_a_folder_can_be_opened(images, write, tmp_path: Path) -> None:
    pixels = images(10)
    write(pixels, np.arange(10), shard_size=4)
    shards = open_shards(tmp_path / "shards" / "train-00001.tar")
    assert np.array_equal(shards.images(np.arange(4)), pixels[4:8])
    assert shards.classes[9] == "class9"


def test_reading_imports_numpy_and_the_standard_library_only(images, write, tmp_path: Path) -> None:
    write(images(10), np.arange(10))
    code = (
        "import sys, numpy; before = set(sys.modules)\n"
        "from shards.reader import open_shards\n"
        f"open_shards({str(tmp_path / 'shards')!r}).images(numpy.arange(4))\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(new - set(sys.stdlib_module_names) - {'numpy', 'shards', 'dgm'}))"
    )
    command = [sys.executable, "-c", code]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert output == "[]\n"
