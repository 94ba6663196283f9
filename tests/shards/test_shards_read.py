"""Reading by global index, in place."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest

from dgm.common.errors import UserError
from shards.format import INDEX
from shards.reader import Shards, open_shards


@pytest.mark.parametrize("shard_size", [100, 30, 7, 1])
def test_reader_equals_source_for_random_indices(images, write, shard_size: int) -> None:
    pixels, labels = images(100), np.random.default_rng(1).integers(0, 10, 100)
    shards = Shards(write(pixels, labels, shard_size=shard_size))
    assert len(shards) == 100 and shards.num_classes == 10
    index = np.random.default_rng(2).integers(0, 100, 500)
    found, numbers = shards.images(index), shards.labels(index)
    assert np.array_equal(found, pixels[index]) and np.array_equal(numbers, labels[index])
    assert found.dtype == np.uint8 and found.flags.c_contiguous and found.flags.writeable
    assert numbers.dtype == np.int64
    assert np.array_equal(shards.labels(index), numbers)  # the second time, from memory
    assert np.array_equal(shards.images(index.astype(np.uint64)), found)


def test_labels_of_many_digits_keep_the_stride(images, write) -> None:
    labels = np.array([0, 9, 10, 99, 100, 999, 1000, 1233])
    shards = Shards(write(images(8), labels, classes=1234))
    assert shards.labels(np.arange(8)).tolist() == labels.tolist()


def test_a_label_that_is_no_number_is_refused(images, write) -> None:
    folder = write(images(2), np.arange(2))
    with (folder / "train-00000.tar").open("r+b") as tar:
        tar.seek(512)
        tar.write(b"x")
    with pytest.raises(UserError, match="shards has a label that is not a number"):
        Shards(folder).labels(np.arange(2))


def test_index_out_of_range_raises_index_error(images, write) -> None:
    shards = Shards(write(images(10), np.arange(10), shard_size=4))
    for bad in ([0, 10], [-1], [2**40]):
        for read in (shards.images, shards.labels):
            with pytest.raises(IndexError, match=f"image {bad[-1]}"):
                read(np.array(bad))
    for wrong in (np.zeros(2), np.zeros((2, 2), int)):
        with pytest.raises(IndexError, match="must be integers"):
            shards.images(wrong)


@pytest.mark.parametrize("shard_size", [100, 4])
def test_an_empty_batch_is_an_empty_array(images, write, shard_size) -> None:
    shards = Shards(write(images(10), np.arange(10), shard_size=shard_size))
    assert shards.images(np.array([], np.int64)).shape == (0, 32, 32, 3)
    assert shards.labels(np.array([], np.int64)).shape == (0,)


def test_a_pickled_reader_contains_no_pixels(images, write) -> None:
    pixels = images(50)
    content = pickle.dumps(Shards(write(pixels, np.zeros(50, int))))
    assert len(content) < 1000
    assert np.array_equal(pickle.loads(content).images(np.arange(50)), pixels)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("version", 2, "version 2"),
        ("total", 11, "total 11"),
        ("layout", {"stride": 5120, "label_offset": 512, "pixel_offset": 9999}, "this layout"),
        ("layout", {"stride": 9999, "label_offset": 512, "pixel_offset": 1664}, "this layout"),
        ("shards", [{"name": "../a.tar", "count": 1, "size": 1, "sha256": ""}], "not a plain file"),
    ],
)
def test_a_bad_index_is_refused(images, write, key, value, message) -> None:
    path = write(images(10), np.arange(10)) / INDEX
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(UserError, match=message):
        Shards(path.parent)


def test_one_tar_of_a_folder_can_be_opened(images, write) -> None:
    pixels = images(10)
    shards = open_shards(write(pixels, np.arange(10), shard_size=4) / "train-00001.tar")
    assert np.array_equal(shards.images(np.arange(4)), pixels[4:8])
    assert shards.classes[9] == "class9"


def test_reading_imports_numpy_and_the_standard_library_only(images, write, run_script) -> None:
    folder = write(images(10), np.arange(10))
    code = (
        "import sys, numpy; before = set(sys.modules)\n"
        "from shards.reader import open_shards\n"
        f"open_shards({str(folder)!r}).images(numpy.arange(4))\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(new - set(sys.stdlib_module_names) - {'numpy', 'shards', 'dgm'}))"
    )
    assert run_script("-c", code).stdout == "[]\n"
