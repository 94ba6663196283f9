"""Progress of long work on stderr: a labelled bar on a terminal, two lines elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

DELAY_S = 2.0
"""Work that is done sooner shows nothing."""


class Progress:
    """Counts what is done; see `progress`."""

    def __init__(self, label: str, total: int | None, unit: str, shown: bool):
        self._label, self._lock, self._began = label, threading.Lock(), time.monotonic()
        self._lines = shown and not sys.stderr.isatty()
        self._started = False
        self._bar: Any = None
        if shown and not self._lines:
            from tqdm import tqdm  # Not above: reading images needs NumPy alone.

            self._bar = tqdm(
                desc=label, total=total, unit=unit, unit_scale=unit == "B", leave=False,
                delay=DELAY_S, dynamic_ncols=True,
            )  # fmt: skip

    @property
    def elapsed_s(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self._began

    def advance(self, count: int = 1) -> None:
        """Count `count` more as done; may be called from several threads."""
        with self._lock:
            if self._bar is not None:
                self._bar.update(count)
            elif self._lines and not self._started and self.elapsed_s > DELAY_S:
                self._started = True
                print(self._label, file=sys.stderr, flush=True)

    def relabel(self, label: str) -> None:
        """Show another label on the bar."""
        with self._lock:
            if self._bar is not None:
                self._bar.set_description(label, refresh=self.elapsed_s > DELAY_S)

    def close(self, done: str | None) -> None:
        """Remove the bar; print `done` and the time, where it took long and stderr is a file."""
        if self._bar is not None:
            self._bar.close()
        if done is not None and self._lines and self.elapsed_s > DELAY_S:
            print(f"{done} in {duration(self.elapsed_s)}", file=sys.stderr, flush=True)


@contextmanager
def progress(
    label: str, done: str, total: int | None = None, unit: str = "image", shown: bool = True
) -> Iterator[Progress]:
    """Show the progress of the block where it takes more than `DELAY_S` seconds.

    label: what is being done, such as `decoding 50,000 images`; done: the same once it is,
    `decoded 50,000 images`; unit: what is counted, `B` for bytes; shown: False shows nothing.
    """
    work = Progress(label, total, unit, shown)
    finished = False
    try:
        yield work
        finished = True
    finally:
        work.close(done if finished else None)


def counted(count: int, thing: str) -> str:
    """Return a count with its noun: `1 tar`, `50,000 images`."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def duration(seconds: float) -> str:
    """Return seconds in words: `41 s`, `12 min`, `1 h 20 min`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def size_of(count: int) -> str:
    """Return a number of bytes in words: `154 MB`."""
    value = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:,.3g} TB"
