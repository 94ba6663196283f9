"""Processes of benchmarks, killed with all processes that they started."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]


def run(command: Sequence[str]) -> str:
    """Run a command from the root and return what it prints; raise RuntimeError if it fails."""
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-8000:]}")
    return done.stdout


def run_json(command: Sequence[str]) -> dict[str, Any]:
    """Run a command from the root; return the JSON object that it prints last."""
    found: dict[str, Any] = json.loads(run(command).splitlines()[-1])
    return found


def descendants(pid: int) -> list[psutil.Process]:
    """Return all processes below one; none if it has ended."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def kill(processes: Iterable[psutil.Process]) -> None:
    """Kill processes that may have ended."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def kill_tree(process: subprocess.Popen, others: Sequence[psutil.Process] = ()) -> None:
    """Kill a child with all processes that it started, and `others`; wait for their end."""
    process.send_signal(signal.SIGSTOP)  # so that it starts none after they are listed
    killed = [*descendants(process.pid), *others]
    kill(killed)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while any(map(_is_running, killed)) and time.monotonic() < deadline:
        time.sleep(0.01)  # a killed process holds its memory for a moment


def _is_running(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
