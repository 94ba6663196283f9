"""Default shards are rebuilt when their source folder changes; given shards are not."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import os
import pickle
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tars import write_tar
from torchvision.datasets import CIFAR10
from trees import tree_of

from dgm.common.errors import UserError
from shards.build import build, default_folder, ensure
from shards.format import INDEX, SOURCE_FILES, load_index
from shards.reader import Shards
from shards.sources import FolderOptions, open_source
from shards.verify import verify


@pytest.fixture
def tree(class_tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a folder of two classes of three images, and work beside it."""
    monkeypatch.chdir(tmp_path)
    return class_tree(tmp_path / "tree")


def grey(path: Path, value: int = 7) -> None:
    Image.new("RGB", (32, 32), (value, value, value)).save(path)


@pytest.mark.parametrize("resize", [None, 8])
def test_an_unchanged_folder_is_built_once(tree: Path, capsys, resize: int | None) -> None:
    source = f"folder:{tree}"
    folder = ensure(source, resize=resize, progress=False)
    assert folder == default_folder(source, resize=resize)
    assert Shards(folder).image_shape == (resize or 32, resize or 32, 3)
    before = (folder / INDEX).stat().st_ino
    ensure(source, resize=resize, progress=False)
    assert (folder / INDEX).stat().st_ino == before and capsys.readouterr().out == ""
    index = verify(folder)
    assert index.total == index.source_files.count == 6


def test_touched_files_give_the_same_shards(tree: Path, capsys) -> None:
    folder = ensure(f"folder:{tree}", progress=False)
    tar, before = (folder / "train-00000.tar").read_bytes(), load_index(folder / INDEX)
    for path in tree.glob("*/*.png"):
        os.utime(path, ns=(5, 5))
    ensure(f"folder:{tree}", progress=False)
    assert "6 images changed: building again" in capsys.readouterr().out
    assert (folder / "train-00000.tar").read_bytes() == tar
    assert load_index(folder / INDEX).shards == before.shards
    ensure(f"folder:{tree}", progress=False)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("split", ["train", "test"])
def test_changes_are_named_and_built(tree: Path, class_tree, capsys, split: str) -> None:
    (tree / "train").mkdir()
    for name in ("cat", "dog"):
        (tree / name).rename(tree / "train" / name)
    class_tree(tree / "test")
    source, home = f"folder:{tree}", tree / split
    folder = ensure(source, split=split, progress=False)
    capsys.readouterr()
    old = Shards(folder)
    before = old.images(np.arange(6))
    # Replaced by a file of the same size with another modification time.
    content = (home / "cat" / "0001.png").read_bytes()
    os.utime(home / "cat" / "0001.png", ns=(1, 1))
    (home / "cat" / "0002.png").unlink()
    for number in range(3, 6):
        grey(home / "dog" / f"{number:04d}.png")
    if split == "train":
        (home / "eel").mkdir()
        grey(home / "eel" / "0.png")
    assert ensure(source, split=split, progress=False) == folder
    more, new = ("4 images", ", class eel new") if split == "train" else ("3 images", "")
    message = f"{folder}: {more} added, 1 image removed, 1 image changed{new}: building again\n"
    assert capsys.readouterr().out == message
    now = Shards(folder)
    assert len(now) == 8 + (split == "train") and (now.images(np.array([7])) == 7).all()
    assert now.classes == ("cat", "dog", "eel")[: 3 if split == "train" else 2]
    assert np.array_equal(old.images(np.arange(6)), before)  # the memory map of the old files
    assert (home / "cat" / "0001.png").read_bytes() == content
    assert len(list(folder.parent.iterdir())) == 1 and verify(folder)


def test_a_change_that_cannot_be_built_leaves_the_shards(tree: Path) -> None:
    folder = ensure(f"folder:{tree}", progress=False)
    before = tree_of(folder.parent)
    (tree / "cat" / "0001.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="not a readable image"):
        ensure(f"folder:{tree}", progress=False)
    assert tree_of(folder.parent) == before


@pytest.mark.parametrize("how", ["gone", "empty"])
def test_shards_of_a_folder_that_is_gone_are_used(tree: Path, capsys, how: str) -> None:
    folder = ensure(f"folder:{tree}", progress=False)
    capsys.readouterr()
    shutil.rmtree(tree)
    if how == "empty":  # as where a disk is not mounted
        tree.mkdir()
    assert ensure(f"folder:{tree}", progress=False) == folder
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{folder}: used as it is") and str(tree) in line


def test_a_missing_listing_is_not_an_error(tree: Path, capsys) -> None:
    folder = ensure(f"folder:{tree}", progress=False)
    (folder / SOURCE_FILES).unlink()
    ensure(f"folder:{tree}", progress=False)
    assert capsys.readouterr().out == ""
    (tree / "cat" / "0001.png").unlink()
    ensure(f"folder:{tree}", progress=False)
    assert "its images changed: building again" in capsys.readouterr().out
    assert len(Shards(folder)) == 5


@pytest.mark.slow
def test_concurrent_rebuilds_of_a_changed_folder_agree(tree: Path, start_script) -> None:
    folder = ensure(f"folder:{tree}", progress=False)
    for number in range(400):
        grey(tree / "cat" / f"new{number:04d}.png", number % 256)
    code = (
        "from shards.build import ensure; from shards.reader import Shards\n"
        f"print(len(Shards(ensure('folder:{tree}', progress=False))))"
    )
    started = [start_script("-c", code, cwd=tree.parent) for _ in range(3)]
    message = [process.communicate(timeout=60)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0]
    assert all(text.splitlines()[-1] == "406" for text in message)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name] and verify(folder)


def test_a_linked_default_folder_stays_a_link(tree: Path) -> None:
    folder = ensure(f"folder:{tree}", progress=False)
    folder.rename("elsewhere")
    folder.symlink_to(Path("elsewhere").absolute())
    grey(tree / "cat" / "new.png")
    ensure(f"folder:{tree}", progress=False)
    assert folder.is_symlink() and len(Shards("elsewhere")) == 7


def test_given_shards_are_kept_with_a_warning_that_their_source_changed(tree: Path) -> None:
    source = f"folder:{tree}"
    build(source, "train", Path("mine"), progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ensure(source, "mine")
        grey(tree / "cat" / "new.png")
        ensure("cifar10", "mine")
    with pytest.warns(UserWarning, match=r"mine was built from .* \(1 image added\)"):
        assert len(Shards(ensure(source, "mine"))) == 6
    shutil.rmtree(tree)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ensure(source, "mine")


# Of a version whose index did not list source files.
OLD = (
    '{"version": 1, "total": 2, "image_shape": [4, 4, 3], "image_format": "npy", "classes": '
    '["a", "b"], "split": "train", "source": "folder:/pictures", "shards": '
    '[{"name": "train-00000.tar", "count": 2, "size": 10240, "sha256": '
    '"3d4af86ca892987cd1f4ff5e2361d7ac047c54e72bb4e714f01a9a24ec5fc0fc"}], "layout": {"stride": '
    '2048, "label_offset": 512, "pixel_offset": 1664}, "settings": {"resize": 4}, "checksum": '
    '"643476a1c24e60baece76043d0fe9143f3f1eac12da829d384494fb9c60d95df"}'
)


def test_an_index_of_an_older_version_keeps_its_checksum(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(OLD)
    index = load_index(tmp_path / INDEX)
    assert index.checksum == json.loads(OLD)["checksum"] and index.source_files is None
    assert json.loads(index.to_json()) == json.loads(OLD)


def test_shards_without_a_listing_are_used_and_reported(tree: Path, capsys) -> None:
    folder = ensure(f"folder:{tree}", progress=False)
    content = json.loads((folder / INDEX).read_text())
    for key in ("checksum", "source_files"):
        del content[key]
    (folder / INDEX).write_text(json.dumps(content))
    grey(tree / "cat" / "new.png")
    assert len(Shards(ensure(f"folder:{tree}", progress=False))) == 6
    assert "built by an older version" in capsys.readouterr().out


def test_default_folders_are_unique(tmp_path: Path) -> None:
    every = [
        FolderOptions(), FolderOptions("black"), FolderOptions("1,2,3"), FolderOptions(holdout=0.1),
        FolderOptions(holdout=0.2), FolderOptions(skip_bad=True), FolderOptions("black", 0.1, True),
    ]  # fmt: skip
    sources = [f"folder:{tmp_path}/{name}/x" for name in ("a", "b")]
    arguments = [*itertools.product(sources, ("train", "test"), (None, 16), every)]
    found = {default_folder(*values) for values in arguments}
    found |= {default_folder("shapes", *values) for values in (("train",), ("test", 16))}
    assert len(found) == len(arguments) + 2
    assert default_folder(sources[0]).name.startswith("folder-x-")
    assert default_folder(sources[0], options=FolderOptions("0,0,0")) in found
    assert default_folder("shapes", options=FolderOptions("black")) == Path("data/shapes")


def test_the_root_of_default_folders_is_an_environment_variable(tree: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tree.parent / "home"))
    monkeypatch.setenv("DGM_DATA", "~/shards")
    folder = ensure(f"folder:{tree}", progress=False)
    assert folder.parent == tree.parent / "home" / "shards" and not Path("data").exists()


def test_a_tilde_is_the_home_folder(tree: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tree.parent))
    build("folder:~/tree", "train", Path("~/out"), progress=False)
    assert len(Shards(ensure("folder:~/tree", "~/out"))) == 6 and (tree.parent / "out").is_dir()
    with pytest.raises(UserError, match="does not exist"):
        build("folder:~no-such-user/x", "train", Path("none"), progress=False)


def test_an_unwritable_default_folder_is_an_error_with_remedies(tree: Path, monkeypatch) -> None:
    Path("data").write_text("a file")
    with pytest.raises(UserError, match=r"cannot write .*data.*set DGM_DATA .*--shards DIR"):
        ensure(f"folder:{tree}", progress=False)
    monkeypatch.setenv("DGM_DATA", "other")
    assert len(Shards(ensure(f"folder:{tree}", progress=False))) == 6


def test_cifar10_is_read_from_the_path_that_the_error_names(tmp_path: Path, monkeypatch) -> None:
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # the discard port
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="could not be downloaded") as caught:
        open_source("cifar10", "train")
    assert "source shapes (built in) or folder:PATH" in str(caught.value)
    words = str(caught.value).split()
    place = Path(words[words.index("at") + 1])
    assert "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz" in words
    assert f"(md5 {CIFAR10.tgz_md5})" in str(caught.value)
    # torchvision's checksums are of the real files.
    batch = pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0, 1]})
    meta = pickle.dumps({"label_names": ["a", "b"]})
    files = {"data_batch_1": batch, "test_batch": batch, "batches.meta": meta}
    tar = write_tar(tmp_path / "a.tar", {f"cifar-10-batches-py/{n}": c for n, c in files.items()})
    place.write_bytes(gzip.compress(tar.read_bytes()))
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(place.read_bytes()).hexdigest())
    monkeypatch.setattr(CIFAR10, "train_list", [["data_batch_1", md5["data_batch_1"]]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5["test_batch"]]])
    meta_file = {"filename": "batches.meta", "key": "label_names", "md5": md5["batches.meta"]}
    monkeypatch.setattr(CIFAR10, "meta", meta_file)
    for split in ("train", "test"):
        assert len(list(open_source("cifar10", split).samples())) == 2


def test_build_prints_skipped_files_and_a_summary(run_script, tree: Path) -> None:
    (tree / "cat" / "labels.csv").write_text("x")
    words = ("--source", f"folder:{tree}", "--split", "train", "--out", "out")
    done = run_script("-m", "shards.build", *words, cwd=tree.parent)
    assert done.code == 0, done.stderr
    first, last = done.stdout.splitlines()
    assert first == "left out: 1 file that is not an image (cat/labels.csv)"
    assert last.startswith("data: 6 images, 2 classes, 32 x 32, out, built 20")
