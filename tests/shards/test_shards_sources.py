"""Sources: bad inputs through the command line, and real images."""

from __future__ import annotations

import itertools
import os
import shutil
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


@pytest.fixture
def build_fails(fails, tmp_path: Path):
    """Return a function that builds, expects one error line and nothing written."""

    def run(source: str, *arguments: str, split: str = "train") -> str:
        before = sorted(tmp_path.rglob("*"))
        out = tmp_path / "new" / "out"
        line = fails("build", "--source", source, "--split", split, "--out", out, *arguments)
        assert sorted(tmp_path.rglob("*")) == before
        return line

    return run


def test_unknown_source_is_named(build_fails) -> None:
    assert "'mnist'" in build_fails("mnist")
    assert "'folder:'" in build_fails("folder:")


def test_unknown_arguments_are_named(build_fails) -> None:
    assert "'val'" in build_fails("shapes", split="val")
    assert "'gif'" in build_fails("shapes", "--image-format", "gif")
    assert "--colour" in build_fails("shapes", "--colour", "red")
    assert "ten" in build_fails("shapes", "--shard-size", "ten")
    assert "shard size is 0" in build_fails("shapes", "--shard-size", "0")
    assert "resize is 0" in build_fails("shapes", "--resize", "0")
    assert "seed is -1" in build_fails("shapes", "--seed", "-1")


def test_missing_path_is_named(build_fails, tmp_path: Path) -> None:
    assert f"{tmp_path}/none does not exist" in build_fails(f"folder:{tmp_path}/none")


def test_a_file_in_place_of_a_folder_is_named(build_fails, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert "file is not a folder" in build_fails(f"folder:{tmp_path}/file")


def test_folder_without_classes_is_named(build_fails, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    assert "tree holds no class folders" in build_fails(f"folder:{tmp_path}/tree")


def test_class_without_images_is_named(build_fails, class_tree, tmp_path: Path) -> None:
    tree = class_tree(tmp_path / "tree")
    (tree / "bird").mkdir()
    (tree / "bird" / "notes.txt").write_text("x")
    assert "tree/bird holds no images" in build_fails(f"folder:{tree}")


@pytest.mark.slow
def test_empty_image_is_named(build_fails, class_tree, tmp_path: Path) -> None:
    tree = class_tree(tmp_path / "tree")
    (tree / "dog" / "0001.png").write_bytes(b"")
    assert "dog/0001.png is empty (0 bytes)" in build_fails(f"folder:{tree}")


@pytest.mark.slow
@pytest.mark.parametrize("kept", [20, 1500])
def test_truncated_image_is_named(build_fails, class_tree, tmp_path: Path, kept: int) -> None:
    tree = class_tree(tmp_path / "tree")
    path = tree / "dog" / "0001.png"
    path.write_bytes(path.read_bytes()[:kept])
    assert "dog/0001.png is no readable image" in build_fails(f"folder:{tree}")


@pytest.mark.slow
def test_image_of_another_size_is_named_with_both_sizes(
    build_fails, class_tree, tmp_path: Path
) -> None:
    tree = class_tree(tmp_path / "tree")
    Image.new("RGB", (40, 24)).save(tree / "dog" / "0001.png")
    line = build_fails(f"folder:{tree}")
    assert "1 of 40 x 24 (dog/0001.png)" in line and "5 of 32 x 32 (cat/0000.png)" in line
    assert "--resize 32" in line
    build(f"folder:{tree}", "train", tmp_path / "ok", resize=16, progress=False)
    assert Shards(tmp_path / "ok").image_shape == (16, 16, 3)


@pytest.mark.slow
def test_deep_image_is_named(build_fails, class_tree, tmp_path: Path) -> None:
    tree = class_tree(tmp_path / "tree")
    Image.fromarray(np.zeros((32, 32), np.uint16)).save(tree / "dog" / "0001.png")
    assert "8 bits" in build_fails(f"folder:{tree}")


def test_missing_test_split_is_named(build_fails, class_tree, tmp_path: Path) -> None:
    tree = class_tree(tmp_path / "tree")
    assert "no folder 'test'" in build_fails(f"folder:{tree}", split="test")
    both = tmp_path / "both"
    class_tree(both / "train")
    assert "no folder 'test'" in build_fails(f"folder:{both}", split="test")


def test_unwritable_parent_is_named(fails, class_tree, tmp_path: Path) -> None:
    tree = class_tree(tmp_path / "tree")
    (tmp_path / "file").write_text("x")
    out = tmp_path / "file" / "out"
    line = fails("build", "--source", f"folder:{tree}", "--split", "train", "--out", out)
    assert f"cannot write {out}" in line


@pytest.mark.slow
def test_failed_download_names_the_other_sources(build_fails, monkeypatch) -> None:
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # discard: nobody listens
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    line = build_fails("cifar10")
    assert "cifar10 could not be downloaded" in line
    assert "shapes" in line and "folder:PATH" in line


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


def test_every_suffix_and_mode_becomes_rgb(tmp_path: Path) -> None:
    folder = tmp_path / "only"
    folder.mkdir()
    image = Image.new("RGB", (8, 8), (200, 100, 50))
    for name in ("a.png", "b.JPG", "c.jpeg", "d.bmp", "e.webp"):
        image.save(folder / name)
    image.convert("L").save(folder / "f.png")
    image.convert("RGBA").save(folder / "g.png")
    image.convert("P").save(folder / "h.png")
    found = [image for image, _ in open_source(f"folder:{tmp_path}", "train").samples()]
    assert len(found) == 8 and all(image.shape == (8, 8, 3) for image in found)


def test_resize_cuts_the_centre(tmp_path: Path) -> None:
    (tmp_path / "only").mkdir()
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 20:40] = 255
    Image.fromarray(pixels).save(tmp_path / "only" / "a.png")
    [(image, _)] = open_source(f"folder:{tmp_path}", "train", resize=10).samples()
    assert image.shape == (10, 10, 3) and image.min() > 200


def test_shapes_can_be_resized() -> None:
    source = open_source("shapes", "test", resize=16)
    assert next(source.samples())[0].shape == (16, 16, 3) and source.settings["resize"] == 16


def test_ordered_map_keeps_order_and_bounds_what_is_in_flight() -> None:
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
    shutil.rmtree(train)
