"""Shards that other tools wrote, and image formats that are decoded once, into a cache."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import webdataset
from tars import encode, members, write_tar

from dgm.common.errors import UserError
from shards.build import ensure
from shards.decode_cache import DECODED
from shards.reader import Shards


def thirds(images, extension: str, first: int = 0) -> dict[str, bytes]:
    """Return members whose labels are 0, 1, 2, 0, ..."""
    labels = (number % 3 for number in range(first, first + len(images)))
    return members(images, labels, extension, first=first)


def test_png_shards_equal_the_source(images, write) -> None:
    pixels, labels = images(25), np.arange(25) % 10
    folder = write(pixels, labels, image_format="png", shard_size=10)
    shards = Shards(folder)
    assert np.array_equal(shards.images(np.arange(25)), pixels)
    assert np.array_equal(shards.labels(np.arange(25)), labels)
    assert shards.classes[9] == "class9" and shards.folder.parent.name == DECODED
    assert ensure("test", folder) == folder


def test_ensure_names_a_damaged_decoded_shard(images, write) -> None:
    folder = write(images(5), np.arange(5), image_format="png")
    [path] = Shards(folder).folder.glob("*.tar")
    with path.open("r+b") as tar:
        tar.seek(2000)
        tar.write(bytes(100))
    with pytest.raises(UserError, match=r"has changed .*remove /.*/\.decoded/all-\w+ to decode it"):
        ensure("test", folder)


@pytest.mark.parametrize("extension", ["png", "webp", "jpg", "jpeg", "npy"])
def test_shards_without_index_are_read(images, tmp_path: Path, extension: str) -> None:
    pixels = np.kron(images(8, 4, 4), np.ones((1, 8, 8, 1), np.uint8))  # smooth, for jpeg
    for number in (0, 4):
        content = thirds(pixels[number : number + 4], extension, first=number)
        write_tar(tmp_path / "other" / f"{number}.tar", content)
    shards = Shards(tmp_path / "other")
    found = shards.images(np.arange(8)).astype(int)
    tolerance = 40 if extension.startswith("jp") else 0  # chroma is stored at half resolution
    assert np.abs(found - pixels).mean() <= tolerance / 4
    assert np.abs(found - pixels).max() <= tolerance * 4
    assert shards.labels(np.arange(8)).tolist() == [number % 3 for number in range(8)]
    assert shards.classes == ("0", "1", "2")


def test_foreign_fixed_stride_shards_are_read_in_place(images, tmp_path: Path, cache: Path) -> None:
    pixels = images(8)
    for number in (0, 4):
        content = thirds(pixels[number : number + 4], "npy", first=number)
        write_tar(tmp_path / "other" / f"{number}.tar", content)
    for _ in range(2):
        shards = Shards(tmp_path / "other")
        assert shards.folder == tmp_path / "other"
        assert np.array_equal(shards.images(np.arange(8)), pixels)
        assert shards.labels(np.arange(8)).tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert sorted(path.name for path in (tmp_path / "other").iterdir()) == ["0.tar", "4.tar"]
    assert len(list((cache / "dgm" / "index").iterdir())) == 1


def test_stock_webdataset_tars_with_either_member_order_are_read_in_place(
    images, tmp_path: Path
) -> None:
    pixels = images(6)
    for label in ("cls", "z.label"):  # members are sorted by extension
        folder = tmp_path / label
        folder.mkdir()
        with webdataset.TarWriter(str(folder / "a.tar")) as writer:
            for number, image in enumerate(pixels):
                text = b"%d\n" % number if label == "z.label" else number
                writer.write({"__key__": f"dir/{number}", "npy": image, label: text})
        shards = Shards(folder)
        assert shards.folder == folder
        assert np.array_equal(shards.images(np.arange(6)), pixels)
        assert shards.labels(np.arange(6)).tolist() == list(range(6))


@pytest.mark.parametrize("odd", ["fortran", "extra member", "order", "version 2", "text label"])
def test_unusual_npy_layouts_are_decoded(images, tmp_path: Path, odd: str) -> None:
    pixels = images(6)
    content = thirds(pixels, "npy")
    if odd == "fortran":
        content["0002.npy"] = encode(np.asfortranarray(pixels[2]), "npy")
    elif odd == "extra member":
        content = {**content, "0002.json": b'{"note": 1}'}
        content = {name: content[name] for name in sorted(content)}
    elif odd == "order":
        names = list(content)
        names[2:4] = reversed(names[2:4])
        content = {name: content[name] for name in names}
    elif odd == "version 2":
        path = tmp_path / "image.npy"
        with path.open("wb") as stream:
            np.lib.format.write_array(stream, pixels[3], version=(2, 0))
        content["0003.npy"] = path.read_bytes()
    else:
        content["0001.cls"] = b"  1\n"
    write_tar(tmp_path / "other" / "a.tar", content)
    shards = Shards(tmp_path / "other")
    assert DECODED in shards.folder.parts
    assert np.array_equal(shards.images(np.arange(6)), pixels)
    assert shards.labels(np.arange(6)).tolist() == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize(
    ("extension", "contents", "classes"),
    [
        ("label", [b"1", b"0", b"2"], ("0", "1", "2")),
        ("class.txt", [b"dog", b"cat\n", b"owl"], ("cat", "dog", "owl")),
        ("json", [b'{"label": 9}', b'{"label": 4}', b'{"label": 12}'], ("4", "9", "12")),
        ("json", [b'{"cls": "dog"}', b'{"cls": "cat"}', b'{"cls": "owl"}'], ("cat", "dog", "owl")),
    ],
)
def test_labels_are_found(images, tmp_path: Path, extension, contents, classes) -> None:
    content = {}
    for number, (image, label) in enumerate(zip(images(3), contents, strict=True)):
        content[f"{number}.png"] = encode(image, "png")
        content[f"{number}.{extension}"] = label
    shards = Shards(write_tar(tmp_path / "other" / "a.tar", content))
    assert shards.classes == classes and shards.labels(np.arange(3)).tolist() == [1, 0, 2]


def test_a_changed_tar_is_decoded_again(images, tmp_path: Path) -> None:
    path = tmp_path / "other" / "a.tar"
    for seed in (0, 1):
        pixels = images(4, seed=seed)
        write_tar(path, thirds(pixels, "png"))
        os.utime(path, ns=(0, seed))
        assert np.array_equal(Shards(path.parent).images(np.arange(4)), pixels)
    assert len(list((path.parent / DECODED).iterdir())) == 1


def test_a_folder_and_one_of_its_tars_have_separate_copies(images, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "other" / "a.tar", thirds(images(4), "png"))
    folders = [Shards(place).folder for place in (path.parent, path)]
    assert folders == [Shards(place).folder for place in (path.parent, path)]
    assert len(set(folders)) == 2


def test_a_folder_that_cannot_be_written_is_decoded_into_the_cache(
    images, tmp_path: Path, cache: Path, monkeypatch
) -> None:
    pixels = images(4)
    write_tar(tmp_path / "other" / "a.tar", thirds(pixels, "png"))
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write anywhere
    for _ in range(2):
        shards = Shards(tmp_path / "other")
        assert np.array_equal(shards.images(np.arange(4)), pixels)
        assert shards.folder.parent == cache / "dgm" / "decoded"
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["a.tar"]


PNG = "needs a png"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"/0.cls": b"1", "/0.png": PNG}, "unsafe member /0.cls"),
        ({"a/../../0.cls": b"1", "a/../../0.png": PNG}, r"unsafe member a/\.\./"),
        ({"7.png": PNG}, r"a.tar: sample 7 has no label"),
        ({"7.cls": b"1"}, r"a.tar: sample 7 has no image"),
        ({"7.cls": b"", "7.png": PNG}, r"a.tar: sample 7 has no label"),
        ({"7.cls": b"-1", "7.png": PNG, "8.cls": b"0", "8.png": PNG}, "some labels are numbers"),
        ({"7.cls": b"9223372036854775808", "7.png": PNG, "8.cls": b"1", "8.png": PNG},
         r"some labels are numbers from 0, others names \(1 and '9223372036854775808'"),
        ({"7.json": b"{}", "7.png": PNG}, r"a.tar: sample 7 has no label"),
        ({"7.json": b"[", "7.png": PNG}, r"a.tar: sample 7 has an unreadable label"),
        ({"7.json": b'{"label": -1}', "7.png": PNG}, r"a.tar: sample 7 has no label"),
        ({"7.json": b'{"label": 9223372036854775808}', "7.png": PNG}, r"7 has label 92.* below 2"),
        ({"7.cls": b"1", "7.png": PNG, "7.seg.png": PNG}, "sample 7 has several images"),
        ({"7.cls": b"1", "8.cls": b"1", "7.png": PNG}, r"a.tar: sample 8 has no image"),
        ({"7.cls": b"1", "7.png": PNG, "7.PNG": PNG}, r"a.tar holds 7.PNG twice"),
        ({"7.cls": b"1", "7.png": b""}, r"a.tar: sample 7 is empty"),
        ({"7.cls": b"1", "7.png": b"no image"}, r"a.tar: sample 7 is not a readable image"),
        ({"7.cls": b"1", "7.npy": b"\x93NUMPY"}, r"a.tar: sample 7 is not a readable npy file"),
        ({"README": b"x"}, r"a.tar holds no samples"),
    ],
)  # fmt: skip
def test_bad_samples_are_refused(images, tmp_path: Path, content, message: str) -> None:
    image = encode(images(1)[0], "png")
    content = {name: image if value == PNG else value for name, value in content.items()}
    write_tar(tmp_path / "other" / "a.tar", content)
    with pytest.raises(UserError, match=message):
        Shards(tmp_path / "other")
    left = [path.name for path in tmp_path.rglob("*")]
    assert sorted(left) == ["a.tar", "other"]


@pytest.mark.parametrize("cut", [1, 1024, 4000, 9000])
def test_truncated_tars_are_refused(images, tmp_path: Path, cut: int) -> None:
    path = write_tar(tmp_path / "other" / "a.tar", thirds(images(3), "npy"))
    path.write_bytes(path.read_bytes()[: 3 * 5120 + 1 - cut])
    with pytest.raises(UserError, match=r"a.tar .*truncated"):
        Shards(tmp_path / "other")


def test_tars_of_several_splits_are_refused(images, tmp_path: Path) -> None:
    content = thirds(images(4), "png")
    for name in ("pets-train-000000.tar", "pets-train-000001.tar", "pets-val-000000.tar"):
        write_tar(tmp_path / "other" / name, content)
    with pytest.raises(UserError, match=r"\(pets-train-000000.tar, pets-val-000000.tar\): move"):
        Shards(tmp_path / "other")
    (tmp_path / "other" / "pets-val-000000.tar").unlink()
    assert len(Shards(tmp_path / "other")) == 8


def test_the_error_for_a_parent_folder_names_the_shards_in_it(images, tmp_path: Path) -> None:
    write_tar(tmp_path / "my tars" / "train" / "0.tar", thirds(images(4), "png"))
    with pytest.raises(UserError, match=r"my tars holds no shards, but .*my tars/train does"):
        ensure("shapes", tmp_path / "my tars")
    (tmp_path / "my photos" / "cat").mkdir(parents=True)
    with pytest.raises(UserError, match=r"'.*/my photos', or name .* folder:.*/my photos"):
        ensure("shapes", tmp_path / "my photos")
