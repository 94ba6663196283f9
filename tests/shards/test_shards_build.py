"""Building shards: their bytes, atomic creation, and `ensure`, which trainers call."""

from __future__ import annotations

import io
import os
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import webdataset

from dgm.common.atomic_dirs import new_folder
from dgm.common.errors import UserError
from shards.build import build, default_folder, ensure
from shards.format import INDEX, fixed_layout, npy_header
from shards.reader import Shards

BUILD = ("-m", "shards.build", "--source", "shapes", "--split")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("image_format", ["npy", "png"])
def test_rebuild_is_byte_identical(class_tree, tmp_path: Path, image_format: str) -> None:
    source = f"folder:{class_tree(tmp_path / 'tree')}"
    for name in ("a", "b"):
        build(source, "train", tmp_path / name, image_format, shard_size=4, progress=False)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert len(contents(tmp_path / "a")) == 4  # two tars, index and listing


@pytest.mark.parametrize(("image_format", "decoder"), [("npy", ()), ("png", ("rgb8",))])
def test_stock_webdataset_reads_shards(images, write, image_format: str, decoder: tuple) -> None:
    pixels, labels = images(25), np.arange(25) % 10
    folder = write(pixels, labels, shard_size=10, image_format=image_format)
    urls = sorted(str(path) for path in folder.glob("*.tar"))
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode(*decoder))
    assert np.array_equal(np.stack([sample[image_format] for sample in samples]), pixels)
    assert [sample["cls"] for sample in samples] == labels.tolist()


@pytest.mark.parametrize("shape", [(32, 32), (7, 5), (64, 48), (1, 1)])
def test_layout_is_computed_for_any_image_size(images, write, shape) -> None:
    pixels = images(6, *shape)
    shards = Shards(write(pixels, np.arange(6), shard_size=4))
    layout = fixed_layout((*shape, 3))
    content = (shards.folder / "train-00000.tar").read_bytes()
    start = 2 * layout.stride + layout.pixel_offset
    assert content[start : start + pixels[2].size] == pixels[2].tobytes()
    assert shards.index.layout == layout
    assert layout.pixel_offset == 1536 + len(npy_header((*shape, 3)))
    assert np.array_equal(shards.images(np.arange(6)), pixels)


@pytest.mark.parametrize("shape", [(32, 32, 3), (1, 1, 3), (1024, 768, 3), (99999, 99999, 3)])
def test_npy_header_equals_numpys(shape: tuple[int, int, int]) -> None:
    stream = io.BytesIO()
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)
    assert npy_header(shape) == stream.getvalue()


def test_build_fills_an_empty_folder_and_a_link_to_one(class_tree, tmp_path: Path) -> None:
    source = f"folder:{class_tree(tmp_path / 'tree')}"
    for name in ("empty", "target"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("target")
    for name in ("empty", "link"):
        build(source, "train", tmp_path / name, progress=False)
        assert len(Shards(tmp_path / name)) == 6
    assert (tmp_path / "link").is_symlink() and len(Shards(tmp_path / "target")) == 6


def wait_for_tar(parent: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 30
    while not list(parent.glob(".out.tmp-*/*.tar")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_during_a_build_leaves_no_files(start_script, tmp_path: Path, signum: int) -> None:
    parent = tmp_path / "made" / "here"
    process = start_script(*BUILD, "train", "--out", parent / "out")
    wait_for_tar(parent, process)
    process.send_signal(signum)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 128 + signum
    assert stderr.startswith("error: stopped by SIG") and len(stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_next_build_removes_the_files_of_a_killed_one(start_script, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start_script(*BUILD, "train", "--out", out)
    wait_for_tar(tmp_path, process)
    process.kill()
    process.communicate(timeout=30)
    assert not out.exists() and len(list(tmp_path.glob(".out.tmp-*"))) == 1
    build("shapes", "test", out, progress=False)
    assert len(Shards(out)) == 1000 and list(tmp_path.iterdir()) == [out]


def test_temporary_folders_of_running_processes_and_other_hosts_are_kept(tmp_path: Path) -> None:
    host = socket.gethostname()
    kept = [f".out.tmp-{host}-{os.getppid()}-0", ".out.tmp-elsewhere-1-0"]
    for name in kept:
        (tmp_path / name).mkdir()
    with new_folder(tmp_path / "out", INDEX):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, "out"])


@pytest.mark.slow
def test_concurrent_builds_leave_one_complete_folder(start_script, tmp_path: Path) -> None:
    processes = [start_script(*BUILD, "test", "--out", tmp_path / "out") for _ in range(2)]
    errors = [process.communicate(timeout=60)[1] for process in processes]
    codes = [process.returncode for process in processes]
    # One that starts after the other has ended finds a folder that is not empty.
    lines = [line for error in errors for line in error.splitlines() if "error" in line]
    assert 0 in codes and all("not empty" in line for line in lines), errors
    assert len(Shards(tmp_path / "out")) == 1000
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_slower_of_two_builds_accepts_only_equal_data(tmp_path: Path) -> None:
    for text, accepted in (("same", True), ("other", False)):
        out = tmp_path / text
        out.mkdir()
        (out / INDEX).write_text("same")
        try:
            with new_folder(out, INDEX) as folder:
                (folder / INDEX).write_text(text)
        except UserError as error:
            assert not accepted and "other data" in str(error)
        else:
            assert accepted
        assert (out / INDEX).read_text() == "same"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "same"]


def test_concurrent_ensures_agree(class_tree, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = f"folder:{class_tree(tmp_path / 'tree')}"
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda _: ensure(source, progress=False), range(4)))
    assert folders == {default_folder(source)}
    assert len(list((tmp_path / "data").iterdir())) == 1


def test_ensure_refuses_a_default_folder_of_another_source(
    images, write, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    write(images(2), np.arange(2), name="data/shapes")
    with pytest.raises(UserError, match=r"holds test \(train\), not shapes"):
        ensure("shapes")
