"""Disks that are small, or that may not be written to any more."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.drills.lab import NotPossible

_CHUNK = b"\0" * 4096


@contextmanager
def small_disk(place: Path, megabytes: int) -> Iterator[Path]:
    """Mount a disk of so many megabytes, in memory, at a new folder."""
    place.mkdir(parents=True)
    _mount("-t", "tmpfs", "-o", f"size={megabytes}m", "drill", place)
    try:
        yield place
    finally:
        _unmount(place)


def fill(disk: Path, leave: int = 0) -> Path:
    """Fill a disk up to so many bytes by one file, which is given."""
    filler = disk / "filler"
    with open(filler, "wb", buffering=0) as file:
        try:
            while True:
                file.write(_CHUNK)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
        os.ftruncate(file.fileno(), max(file.tell() - leave, 0))
    return filler


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Let nothing be opened for writing in a folder from now on.

    What is open for writing already stays so: Linux makes no disk read-only under it.
    """
    _mount("--bind", folder, folder)
    try:
        _mount("-o", "remount,bind,ro", folder)
        yield
    finally:
        _unmount(folder)


def _mount(*words: object) -> None:
    done = subprocess.run(["mount", *map(str, words)], capture_output=True, text=True)
    if done.returncode != 0:
        raise NotPossible(f"mount: {done.stderr.strip()}")


def _unmount(place: Path) -> None:
    # Lazily: a process that was there may not have ended altogether.
    subprocess.run(["umount", "--lazy", str(place)], check=True)
