"""Progress of work that takes a while: a labelled bar on a terminal, elsewhere lines.

    with progress("making images", 1000):
        for part in parts:
            ...
            advance(len(part))

`advance` may be called anywhere in the block: it updates the innermost open `progress`, and does
nothing where none is open.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator

from tqdm import tqdm

QUIET_S = 2.0
"""Seconds within which work is not worth a line."""
_DELAY_S = 0.5  # until a bar appears


class _Work:
    def __init__(self, label: str, total: float | None, unit: str, processes: int):
        self.label, self.total, self.processes = label, total, processes
        self.done, self.began = 0.0, time.monotonic()
        self.bar: tqdm | None = None
        self.timer: threading.Timer | None = None
        if os.environ.get("RANK", "0") != "0":
            return
        if sys.stderr.isatty():
            shape = "{desc}: {percentage:3.0f}% |{bar}| {n:.0f}/{total} [{elapsed}<{remaining}]"
            columns = shutil.get_terminal_size().columns  # 80 where a terminal does not say
            self.bar = tqdm(
                total=total, desc=label, unit=unit, leave=False, ncols=columns,
                delay=_DELAY_S if total else 0,
                bar_format=shape if total else "{desc} ... [{elapsed}]",
            )  # fmt: skip
        else:
            self.timer = threading.Timer(QUIET_S, self._line, ["..."])
            self.timer.daemon = True
            self.timer.start()

    def advance(self, count: float) -> None:
        """Count work done by this process; the others are taken to be as far."""
        more = count * self.processes
        if self.total is not None:
            more = min(more, self.total - self.done)
        self.done += more
        if self.bar is not None:
            self.bar.update(more)

    def close(self, whole: bool) -> None:
        took = time.monotonic() - self.began
        if self.bar is not None:
            self.bar.close()
        if self.timer is not None:
            self.timer.cancel()
            if whole and took > QUIET_S:
                self._line(f"took {took:.0f} s")

    def _line(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # stderr was closed
            print(f"{self.label} {text}", file=sys.stderr, flush=True)


_open: list[_Work] = []


@contextlib.contextmanager
def progress(
    label: str, total: float | None = None, unit: str = "img", alone: bool = False
) -> Iterator[None]:
    """Show how far work is, on the first process: a bar on a terminal.

    Elsewhere a line on stderr once it has taken two seconds, and one at its end. `total` is the
    work of all processes, of which each does an equal part, or of this one `alone`; None shows the
    label and the time.
    """
    processes = 1 if alone else int(os.environ.get("WORLD_SIZE", "1"))
    work = _Work(label, total, unit, processes)
    _open.append(work)
    whole = False
    try:
        yield
        whole = True
    finally:
        _open.remove(work)
        work.close(whole)


def advance(count: float) -> None:
    """Count work that was done, for the innermost `progress` that is open, if any."""
    if _open:
        _open[-1].advance(count)
