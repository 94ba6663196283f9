"""Progress of long work: a labeled bar on a terminal, otherwise two lines.

    with progress("making images", 1000):
        for part in parts:
            ...
            advance(len(part))

`advance` may be called anywhere in the block: it updates the innermost open `progress`, if any.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from dgm.common.formatting import duration

QUIET_S = 2.0
"""Shorter work is not reported."""
DELAY_S = 0.5
"""Seconds until a bar appears."""


class Progress:
    """The progress of one block; see `progress`."""

    def __init__(self, label: str, total: float | None, unit: str, processes: int, show: bool):
        """Start a bar, or a timer that prints a line after `QUIET_S`."""
        self.label, self.total, self.processes = label, total, processes
        self.done, self.began = 0.0, time.monotonic()
        self._lock = threading.Lock()
        self._bar: Any = None
        self._timer: threading.Timer | None = None
        if not show or os.environ.get("RANK", "0") != "0":
            return
        if sys.stderr.isatty():
            from tqdm import tqdm  # here, because reading images needs only NumPy

            bytes_ = unit == "B"
            shape = "{desc}: {percentage:3.0f}% |{bar}| {n:.0f}/{total} [{elapsed}<{remaining}]"
            self._bar = tqdm(
                total=total, desc=label, unit=unit, unit_scale=bytes_, leave=False,
                ncols=_columns(),
                delay=DELAY_S if total or bytes_ else 0,
                bar_format=None if bytes_ else shape if total else "{desc} ... [{elapsed}]",
            )  # fmt: skip
        else:
            self._timer = threading.Timer(QUIET_S, self._print, [f"{label} ..."])
            self._timer.daemon = True
            self._timer.start()

    def advance(self, count: float = 1) -> None:
        """Add work done by this process, from any thread; others are assumed to be equally far."""
        with self._lock:
            more = count * self.processes
            if self.total is not None:
                more = min(more, self.total - self.done)
            self.done += more
            if self._bar is not None:
                self._bar.update(more)

    def relabel(self, label: str) -> None:
        """Change the label of the bar."""
        with self._lock:
            if self._bar is not None:
                self._bar.set_description(label, refresh=time.monotonic() > self.began + DELAY_S)

    def close(self, last: str | None) -> None:
        """Remove the bar; without a terminal, print `last` and the time if the work took long."""
        took = time.monotonic() - self.began
        if self._bar is not None:
            self._bar.close()
        if self._timer is not None:
            self._timer.cancel()
            if last is not None and took > QUIET_S:
                self._print(f"{last} {duration(took)}")

    def _print(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # stderr was closed
            print(text, file=sys.stderr, flush=True)


def _columns() -> int:
    with contextlib.suppress(OSError, ValueError):
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80  # 0: unknown
    return 80


_open: list[Progress] = []


@contextlib.contextmanager
def progress(
    label: str,
    total: float | None = None,
    unit: str = "img",
    *,
    done: str | None = None,
    single_process: bool = False,
    show: bool = True,
) -> Iterator[Progress]:
    """Show the progress of a block on stderr; only the first process does.

    total: the work of all processes, each doing an equal part, or with `single_process` that of
    this one; None shows only label and time. unit: `B` for bytes. done: replaces the label in the
    last line, such as `decoded 50,000 images`.
    """
    processes = 1 if single_process else int(os.environ.get("WORLD_SIZE", "1"))
    work = Progress(label, total, unit, processes, show)
    _open.append(work)
    last = None
    try:
        yield work
        last = f"{label} took" if done is None else f"{done} in"
    finally:
        _open.remove(work)
        work.close(last)


def advance(count: float) -> None:
    """Add completed work to the innermost open `progress`, if any."""
    if _open:
        _open[-1].advance(count)
