"""Processes that tests start, and ports for them."""

from __future__ import annotations

import contextlib
import socket
import subprocess
from collections.abc import Iterable

import psutil


def free_port() -> int:
    """Return a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def kill_all(launcher: subprocess.Popen, workers: Iterable[psutil.Process] = ()) -> None:
    """Kill a process and all that it started; workers of a launcher have sessions of their own."""
    found = list(workers)
    if launcher.poll() is None:
        found += [*psutil.Process(launcher.pid).children(recursive=True)]
        launcher.kill()
    for process in found:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
