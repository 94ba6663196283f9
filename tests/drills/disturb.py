"""What disturbs: signals at random or as files appear, bits flipped, bytes cut."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import psutil

from tests.support.warm_processes import Running

_PATIENCE_S = 60.0


def at_random(running: Running, number: int, random: Random, within_s: float) -> float:
    """Send a signal to a process at a random moment of so many seconds; say when it was sent."""
    time.sleep(random.uniform(0, within_s))
    return send(running, number)


def send(running: Running, number: int, rank: int = 0) -> float:
    """Send a signal to one process, if it is still there; say when."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(running.pids[rank], number)
    return time.monotonic()


def as_soon_as(
    running: Running, number: int, condition: Callable[[], bool], rank: int = 0
) -> float | None:
    """Send a signal as soon as a condition holds; None where the process ended before."""
    began = time.monotonic()
    while alive(running.pids[rank]):
        if condition():
            return send(running, number, rank)
        if time.monotonic() - began > _PATIENCE_S:
            return None
    return None


def until_stopped(running: Running, rank: int = 0) -> bool:
    """Wait until a process has stopped itself by SIGSTOP; say whether it did before its end."""
    began = time.monotonic()
    while time.monotonic() - began < _PATIENCE_S:
        try:
            if psutil.Process(running.pids[rank]).status() == psutil.STATUS_STOPPED:
                return True
        except psutil.NoSuchProcess:
            return False
        time.sleep(0.002)
    return False


def go_on(running: Running, rank: int = 0) -> float:
    """Let a stopped process go on; say when."""
    return send(running, signal.SIGCONT, rank)


def alive(pid: int) -> bool:
    """Say whether a process runs or is stopped."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def leave_memory(pid: int, megabytes: int) -> None:
    """Let a process have so much more address space than it has now."""
    limit = psutil.Process(pid).memory_info().vms + megabytes * 2**20
    resource.prlimit(pid, resource.RLIMIT_AS, (limit, limit))


def flip(path: Path, random: Random) -> str:
    """Flip one bit of a file; say which."""
    content = bytearray(path.read_bytes())
    place, bit = random.randrange(len(content)), random.randrange(8)
    content[place] ^= 1 << bit
    path.write_bytes(content)
    return f"bit {bit} of byte {place} of {path.name}"


def cut(path: Path, random: Random) -> str:
    """Cut a file short; say where."""
    size = path.stat().st_size
    left = random.randrange(size)
    os.truncate(path, left)
    return f"{path.name} cut to {left} of {size} bytes"
