"""Sources: damaged and unusual images, and real ones."""

from __future__ import annotations

import itertools
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dgm.common.errors import UserError
from shards.build import build
from shards.images import ordered_map
from shards.reader import Shards
from shards.sources import open_source

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("DGM_TEST_DATA", ROOT.parent / "shared" / "data"))
LOSSLESS = DATA / "cifar10-lossless-6k.tar.gz"


def test_an_image_of_16_bits_is_refused(class_tree, tmp_path: Path) -> None:
    path = class_tree(tmp_path / "tree") / "dog" / "0001.png"
    Image.fromarray(np.zeros((32, 32), np.uint16)).save(path)
    with pytest.raises(UserError, match=r"dog/0001\.png has mode .*8 bits"):
        build(f"folder:{tmp_path}/tree", "train", tmp_path / "out", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["tree"]


def test_test_labels_are_those_of_train_where_a_class_is_missing(
    class_tree, tmp_path: Path
) -> None:
    class_tree(tmp_path / "train", ("a", "b", "c"))
    class_tree(tmp_path / "test", ("a", "c"))
    source = open_source(f"folder:{tmp_path}", "test")
    assert source.classes == ("a", "b", "c")
    assert [label for _, label in source.samples()] == [0, 0, 0, 2, 2, 2]
    class_tree(tmp_path / "test", ("d",))
    with pytest.raises(UserError, match="test/d is a class that train lacks"):
        open_source(f"folder:{tmp_path}", "test")


def test_shapes_have_a_size_and_a_seed() -> None:
    first, second = (open_source("shapes", "test", resize=16, seed=seed) for seed in (0, 1))
    assert first.settings == {"seed": 0, "resize": 16}
    (image, label), (other, same_label) = next(first.samples()), next(second.samples())
    assert image.shape == (16, 16, 3) and (image != other).any() and label == same_label


def test_ordered_map_keeps_order_and_bounds_pending_items() -> None:
    taken = itertools.count()
    results = ordered_map(lambda item: item * 2, (next(taken) for _ in range(10**5)))
    assert list(itertools.islice(results, 100)) == list(range(0, 200, 2))
    assert next(taken) < 5000


@pytest.mark.skipif(not LOSSLESS.exists(), reason="needs the real images in DGM_TEST_DATA")
@pytest.mark.slow
def test_shards_of_real_images_equal_the_files(tmp_path: Path) -> None:
    with tarfile.open(LOSSLESS) as archive:
        archive.extractall(tmp_path, filter="data")
    [train] = tmp_path.glob("**/train")
    build(f"folder:{train.parent}", "train", tmp_path / "out", shard_size=2000, progress=False)
    shards = Shards(tmp_path / "out")
    files = sorted(train.glob("*/*.png"))
    assert len(shards) == len(files) == 5000 and shards.classes[3] == "cat"
    index = np.random.default_rng(0).permutation(5000)[:400]
    pixels, labels = shards.images(index), shards.labels(index)
    for row, number in enumerate(index):
        assert np.array_equal(pixels[row], np.asarray(Image.open(files[number])))
        assert shards.classes[labels[row]] == files[number].parent.name
