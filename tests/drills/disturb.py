"""Disturbances: signals, limited memory, damaged files, and disks that are full or read-only."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import psutil

from tests.drills.lab import NotPossible
from tests.support.warm_processes import Running

_PATIENCE_S = 60.0


def at_random(running: Running, number: int, random: Random, within_s: float) -> float:
    """Send a signal to a process at a random moment within `within_s` seconds; return when."""
    time.sleep(random.uniform(0, within_s))
    return send(running, number)


def send(running: Running, number: int, rank: int = 0) -> float:
    """Send a signal to one process, if it still exists; return when."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(running.pids[rank], number)
    return time.monotonic()


def as_soon_as(
    running: Running, number: int, condition: Callable[[], bool], rank: int = 0
) -> float | None:
    """Send a signal as soon as a condition holds; return when, None if the process ended before."""
    began = time.monotonic()
    while alive(running.pids[rank]):
        if condition():
            return send(running, number, rank)
        if time.monotonic() - began > _PATIENCE_S:
            return None
    return None


def until_stopped(running: Running, rank: int = 0) -> bool:
    """Wait until SIGSTOP has stopped a process; return whether it stopped before it ended."""
    began = time.monotonic()
    while time.monotonic() - began < _PATIENCE_S:
        try:
            if psutil.Process(running.pids[rank]).status() == psutil.STATUS_STOPPED:
                return True
        except psutil.NoSuchProcess:
            return False
        time.sleep(0.002)
    return False


def resume_process(running: Running, rank: int = 0) -> float:
    """Continue a stopped process; return when."""
    return send(running, signal.SIGCONT, rank)


def alive(pid: int) -> bool:
    """Return whether a process runs or is stopped."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def limit_memory(pid: int, megabytes: int) -> None:
    """Limit the address space of a process to what it uses now and `megabytes` more."""
    limit = psutil.Process(pid).memory_info().vms + megabytes * 2**20
    resource.prlimit(pid, resource.RLIMIT_AS, (limit, limit))


def flip(path: Path, random: Random) -> str:
    """Flip one bit of a file; return which."""
    content = bytearray(path.read_bytes())
    place, bit = random.randrange(len(content)), random.randrange(8)
    content[place] ^= 1 << bit
    path.write_bytes(content)
    return f"bit {bit} of byte {place} of {path.name}"


def cut(path: Path, random: Random) -> str:
    """Truncate a file; return where."""
    size = path.stat().st_size
    left = random.randrange(size)
    os.truncate(path, left)
    return f"{path.name} cut to {left} of {size} bytes"


_CHUNK = b"\0" * 4096


@contextmanager
def small_disk(place: Path, megabytes: int) -> Iterator[Path]:
    """Mount a disk of this size, in memory, at a new folder."""
    place.mkdir(parents=True)
    _mount("-t", "tmpfs", "-o", f"size={megabytes}m", "drill", place)
    try:
        yield place
    finally:
        _unmount(place)


def fill(disk: Path, leave: int = 0) -> Path:
    """Fill a disk with one file, except for `leave` bytes; return the file."""
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
    """Make a folder read-only.

    Files that are already open for writing are not affected.
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
    # Lazily: a process that used the folder may not have ended yet.
    subprocess.run(["umount", "--lazy", str(place)], check=True)
