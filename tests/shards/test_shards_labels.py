"""Labels of shards that other tools wrote: the labels that occur are numbered from 0.

Test labels get the numbers of the train classes.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from tars import encode, members, write_tar

from dgm.common.errors import UserError
from shards import decode_cache
from shards.build import ensure
from shards.format import INDEX, load_index
from shards.reader import Shards, match_classes


@pytest.fixture
def tar_of(images, tmp_path: Path):
    """Return a maker of a tar with one image for each label, and its folder."""

    def make(labels: list[object], extension: str = "npy", name: str = "other", kind: str = "cls"):
        content = members(images(len(labels)), labels, extension, kind)
        return write_tar(tmp_path / name / "a.tar", content).parent

    return make


def labels_of(shards: Shards) -> list[int]:
    return shards.labels(np.arange(len(shards))).tolist()


@pytest.mark.parametrize("extension", ["npy", "png"])
@pytest.mark.parametrize(
    ("labels", "classes", "numbers"),
    [
        ([1, 10, 2, 1], ("1", "2", "10"), [0, 2, 1, 0]),
        ([282, 101, 282], ("101", "282"), [1, 0, 1]),
        ([7, 7], ("7",), [0, 0]),
        ([20_000_000_000, 3], ("3", "20000000000"), [1, 0]),
        ([2**63 - 1, 0], ("0", str(2**63 - 1)), [1, 0]),
        ([0, 2, 1], ("0", "1", "2"), [0, 2, 1]),
    ],
)
def test_labels_that_occur_are_numbered(
    tar_of, extension: str, labels: list[int], classes: tuple[str, ...], numbers: list[int]
) -> None:
    folder = tar_of(labels, extension)
    for _ in range(2):  # first scanned, then from the cached index
        shards = Shards(folder)
        assert (shards.folder == folder) == (extension == "npy")
        assert shards.classes == classes and shards.num_classes == len(classes)
        assert labels_of(shards) == numbers
    assert labels_of(pickle.loads(pickle.dumps(shards))) == numbers


def test_labels_from_0_need_no_label_values(tar_of) -> None:
    assert "label_values" not in Shards(tar_of([0, 1, 2])).index.to_json()


@pytest.mark.parametrize("extension", ["npy", "png"])
def test_test_labels_are_numbered_by_the_train_classes(tar_of, extension: str) -> None:
    train = Shards(tar_of([1, 2, 3], extension, "train"))
    test = tar_of([1, 3, 3], extension, "test")
    assert labels_of(Shards(test, classes=train.classes)) == [0, 2, 2]
    assert ensure("test", test, "test", classes=train.classes) == test
    strange = tar_of([1, 4], extension, "strange")
    with pytest.raises(UserError, match=r"images of class 4, which the train images lack \(1, 2"):
        ensure("test", strange, "test", classes=train.classes)


def test_classes_match_by_name_in_any_order(images, write) -> None:
    folder = write(images(4), np.array([0, 1, 2, 3]), classes=5)
    shards = Shards(folder, classes=("class3", "class2", "class1", "class0"))
    assert labels_of(shards) == [3, 2, 1, 0]  # of class4 there are no images
    assert shards.classes[0] == "class3" and not shards.matched_by_number


@pytest.mark.parametrize(
    ("own", "given", "found", "by_number"),
    [
        (("b", "a"), ("a", "b"), [1, 0], False),
        (("0", "2"), ("0", "1", "2"), [0, 2], False),
        (("1", "3"), ("1", "2", "3"), [0, 2], False),
        (("cat", "dog"), ("0", "1"), [0, 1], True),
        (("0", "2"), ("cat", "dog", "owl"), [0, 2], True),
        (("0", "3"), ("cat", "dog", "owl"), [0, None], True),
        (("cat", "cow"), ("cat", "dog"), [0, None], False),
        (("cat", "cow"), ("emu", "dog"), [None, None], False),
        (("cat", "cow"), ("1", "2"), [None, None], False),
    ],
)
def test_classes_match(own, given, found, by_number) -> None:
    assert match_classes(own, given) == (found, by_number)


def test_a_match_by_number_is_reported(images, write) -> None:
    folder = write(images(3), np.arange(3), classes=3)
    with pytest.warns(UserWarning, match="matched with those of the train images by number"):
        ensure("test", folder, "test", classes=("0", "1", "2"))


@pytest.mark.parametrize("extension", ["npy", "png"])
def test_caches_of_another_version_are_not_used(
    tar_of, cache: Path, extension: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tar_of([282, 101], extension)
    names = []
    for version in (2, 3):
        monkeypatch.setattr(decode_cache, "_VERSION", version)
        assert Shards(folder).classes == ("101", "282")
        names += [path.name for path in (cache / "dgm").rglob("*.json") if path.name != INDEX]
        names += [path.name for path in folder.glob(".decoded/*")]
    assert len(set(names)) == 2


def test_scanned_tars_have_checksums(tar_of, images) -> None:
    folder = tar_of([0, 1])
    [shard] = Shards(folder).index.shards
    assert shard.sha256 == hashlib.sha256((folder / "a.tar").read_bytes()).hexdigest()
    write_tar(folder / "a.tar", members(images(2, seed=5), (0, 1)))
    [changed] = Shards(folder).index.shards
    assert changed.count == shard.count and changed.sha256 != shard.sha256


def test_damaged_label_values_are_refused(tar_of, cache: Path, tmp_path: Path) -> None:
    Shards(tar_of([1, 2]))
    [known] = (cache / "dgm" / "index").iterdir()
    for values in ([2, 1], [1], [1, 1], [-1, 2], ["1", 2], [1, 2**63], 5):
        content = json.loads(known.read_text())
        del content["checksum"]
        content["label_values"] = values
        (tmp_path / INDEX).write_text(json.dumps(content))
        with pytest.raises(UserError, match=r"index\.json is damaged \(.*; build"):
            load_index(tmp_path / INDEX)


def test_members_of_a_sample_need_not_be_adjacent(images, tmp_path: Path) -> None:
    pixels = images(3)
    content = {f"{n}.cls": b"%d" % n for n in range(3)}
    content |= {f"{n}.png": encode(image, "png") for n, image in enumerate(pixels)}
    tar = write_tar(tmp_path / "other" / "a.tar", content)
    with pytest.warns(UserWarning, match=r"members of sample 0 are not adjacent.*tar --sort=name"):
        shards = Shards(tar)
    assert np.array_equal(shards.images(np.arange(3)), pixels) and labels_of(shards) == [0, 1, 2]
