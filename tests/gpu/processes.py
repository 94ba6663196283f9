"""Commands with a time limit, killed with all that they started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

import psutil

from dgm.benchmarks.processes import ROOT, descendants, kill, kill_tree

GRACE_S = 4.0  # between SIGTERM and SIGKILL
_stopped = threading.Event()


class CommandError(RuntimeError):
    """A command that failed or exceeded its time limit; the message is one line."""


def run_limited(
    words: Sequence[str | Path], log: Path, seconds: float, env: Mapping[str, str] | None = None
) -> None:
    """Run a command from the root, in a process group of its own, with its output in `log`.

    At its time limit the group gets SIGTERM, so that it can save, and then SIGKILL. Raise
    CommandError if the command took too long or its exit code is not 0.
    """
    if _stopped.is_set():
        raise CommandError("stopped before it began")
    start = time.monotonic()
    with log.open("a") as output:
        process = subprocess.Popen(
            [*map(str, words)], stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            env=env, cwd=ROOT, start_new_session=True,
        )  # fmt: skip
    grace = min(GRACE_S, seconds / 4)
    started: list[psutil.Process] = []
    try:
        code = process.wait(max(0.0, seconds - grace))
    except subprocess.TimeoutExpired:
        started = descendants(process.pid)  # includes those that have left the group
        _signal_group(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace)
        took = time.monotonic() - start
        raise CommandError(f"stopped after its {took:.0f} s: {last_line(log)}") from None
    finally:
        kill_group(process, started)
    if code:
        raise CommandError(f"ended with code {code}: {last_line(log)}")


def kill_group(process: subprocess.Popen, others: Sequence[psutil.Process] = ()) -> None:
    """Kill a process that leads a group, the group, all descendants, and `others`."""
    started = [*others, *descendants(process.pid)]
    _signal_group(process.pid, signal.SIGKILL)  # the group may outlive its leader
    kill_tree(process, started)


def end_on_signals(at_once: bool = False) -> None:
    """On SIGTERM and SIGINT, kill all that this process started, in any thread, and exit.

    The exit is a SystemExit, so that results can be packed, or immediate with `at_once`.
    """

    def end(number: int, frame: FrameType | None) -> NoReturn:
        signal.signal(number, signal.SIG_IGN)
        _stopped.set()
        kill(descendants(os.getpid()))
        if at_once:
            os._exit(128 + number)
        sys.exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)


def _signal_group(number: int, what: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(number, what)


def last_line(log: Path) -> str:
    """Return the last line of a log that is not empty."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    return next((line[:300] for line in reversed(lines) if line), "no output")
