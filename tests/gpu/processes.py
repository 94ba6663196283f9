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

GRACE_S = 4.0  # between being asked to end and being killed
_stopped = threading.Event()


class CommandError(RuntimeError):
    """A command that failed or outlived its time; the message is one line."""


def run_command(
    words: Sequence[str | Path], log: Path, seconds: float, env: Mapping[str, str], cwd: Path
) -> None:
    """Run a command in a process group of its own, its output in `log`.

    At its time limit the whole group is asked to end, so that it can save, and then killed. Raises
    CommandError where it took too long or its exit code is not 0.
    """
    if _stopped.is_set():
        raise CommandError("stopped before it began")
    start = time.monotonic()
    with log.open("a") as output:
        process = subprocess.Popen(
            [*map(str, words)], stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            env=dict(env), cwd=cwd, start_new_session=True,
        )  # fmt: skip
    grace = min(GRACE_S, seconds / 4)
    started: list[int] = []
    try:
        code = process.wait(max(0.0, seconds - grace))
    except subprocess.TimeoutExpired:
        started = _descendants(process.pid)  # those that leave the group are orphans later
        _signal_group(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace)
        took = time.monotonic() - start
        raise CommandError(f"stopped after its {took:.0f} s: {last_line(log)}") from None
    finally:
        kill_group(process, started)
    if code:
        raise CommandError(f"ended with code {code}: {last_line(log)}")


def stop_all() -> None:
    """Kill all that this process started, in any thread, and start no more."""
    _stopped.set()
    for number in _descendants(os.getpid()):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(number, signal.SIGKILL)


def kill_group(process: subprocess.Popen, started: Sequence[int] = ()) -> None:
    """Kill a process that leads a group, all of its descendants, and others that it `started`."""
    children = {*started, *_descendants(process.pid)}
    _signal_group(process.pid, signal.SIGKILL)  # the group may outlive its leader
    for number in children:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(number, signal.SIGKILL)
    process.wait()


def end_on_signals(at_once: bool = False) -> None:
    """End with all that this process started where it is asked to end.

    By SystemExit, so that what was found can be packed, or `at_once`.
    """

    def end(number: int, frame: FrameType | None) -> NoReturn:
        signal.signal(number, signal.SIG_IGN)
        stop_all()
        if at_once:
            os._exit(128 + number)
        sys.exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)


def _signal_group(number: int, what: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(number, what)


def _descendants(root: int) -> list[int]:
    """List all processes below one, by Linux's /proc."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                stat = (entry / "stat").read_text()
                parent = int(stat.rpartition(")")[2].split()[1])
                parents.setdefault(parent, []).append(int(entry.name))
    found, waiting = [], [root]
    while waiting:
        children = parents.get(waiting.pop(), [])
        found += children
        waiting += children
    return found


def last_line(log: Path) -> str:
    """Return the last line of a log that is not empty."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    return next((line[:300] for line in reversed(lines) if line), "no output")
