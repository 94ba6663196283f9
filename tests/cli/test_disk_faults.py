"""A full or read-only disk ends a run with one line; what was saved stays whole."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from errors import error_of
from tiny import LAUNCH

from dgm.common.run_files import scan_metrics
from dgm.training import checkpoint

SCRIPT = LAUNCH / "train_vae.py"
PAGE = 4096

pytestmark = pytest.mark.slow


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a disk of 4 MiB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.xfail("only root may mount a small disk, and not everywhere")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def train(run_warm: Callable, tiny_configs: dict[str, Path], disk: Path) -> Callable:
    """Return a function that trains the run on the disk up to a number of steps."""

    def run(steps: int, *options: str, processes: int = 1):
        words = ["--config", tiny_configs["vae"], "--run.dir", disk / "run", *options]
        return run_warm(SCRIPT, *words, f"--train.total_images={16 * steps}", processes=processes)

    return run


def fill(disk: Path, pages: int) -> Path:
    """Fill the disk up to this many free pages."""
    filler = disk / "filler"
    with open(filler, "wb", buffering=0) as file:
        free = os.statvfs(disk)
        for _ in range(free.f_bavail * free.f_frsize // PAGE - pages):
            file.write(b"\0" * PAGE)
    return filler


def assert_whole(folder: Path, newest: int) -> None:
    saved = checkpoint.complete_names(folder / "checkpoints")
    assert int(saved[-1]) == newest
    assert all(checkpoint.find_fault(folder / "checkpoints" / name) is None for name in saved)
    assert scan_metrics(folder / "metrics.jsonl")[1] == []
    assert not [path for path in folder.rglob(".*") if path.name != ".lock"]


def test_a_disk_fills_up_at_any_file_and_the_run_continues_when_there_is_space(
    train: Callable, disk: Path, tmp_path: Path
) -> None:
    folder = disk / "run"
    assert train(12).code == 0
    for late in ("000000128", "000000192"):
        shutil.rmtree(folder / "checkpoints" / late)
    shutil.copytree(folder, tmp_path / "before")
    named = set()
    # The environment, the log or TensorBoard, parts of a checkpoint, the files written at the end.
    for pages in (0, 2, 12, 40):
        filler = fill(disk, pages)
        error = error_of(train(12))
        newest = int(checkpoint.complete_names(folder / "checkpoints")[-1])
        assert str(folder) in error and f"it continues from {newest} images" in error
        assert_whole(folder, newest)
        file, no_space, _ = error.partition(": No space left")
        assert no_space
        named.add(file.rpartition("/")[2])
        filler.unlink()
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "before", folder)
    print(f"full at: {', '.join(sorted(named))}")
    assert len(named) >= 3
    assert train(12).code == 0
    assert_whole(folder, 192)


def test_two_processes_on_a_full_disk_end_with_one_line(train: Callable, disk: Path) -> None:
    assert train(4).code == 0
    fill(disk, 12)
    error = error_of(train(12, processes=2))
    assert "No space left on device" in error and "it continues from 64 images" in error
    assert_whole(disk / "run", 64)


def test_a_disk_that_became_read_only_is_named(train: Callable, disk: Path) -> None:
    assert train(4).code == 0
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    error = error_of(train(8))
    assert f"{disk / 'run'}, but" in error and "read-only file system: mount it writable" in error
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    assert_whole(disk / "run", 64)
    assert train(8).code == 0
