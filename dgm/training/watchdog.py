"""Ending a process that hangs: with a line that says in what, and where every thread stands."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import threading
import time
from types import FrameType
from typing import Any, Literal

What = Literal["data", "step", "save", "sample", "eval", "start", "prepare"]

_SAY: dict[What, str] = {
    "data": "waiting for data: look at the disk or network that data.shards lies on",
    "step": "in a step: look at the other processes, and at the device",
    "save": "saving: look at the disk of run.dir",
    "sample": "making samples: look at the other processes, and at the device",
    "eval": "measuring: look at the other processes, and at the device",
    "start": "reading what the run left: look at the disk of run.dir and at the other processes",
    "prepare": "opening or building shards: look at the disk or network that they lie on",
}
# Those that may take hours without hanging: as long as they compute, they get on.
_LONG = ("save", "sample", "eval", "start", "prepare")

# What hangs in a page of a mapped file keeps Python's lock, and this thread cannot run. Then the C
# library's timer ends the process instead, a little later and with the threads only.
_MORE = 1.1


class Watchdog:
    """Watch from a thread that something gets done; a step tells it with two assignments."""

    def __init__(self, minutes: float):
        """Prepare to end the process where nothing is done for so long; 0: never."""
        self.minutes, self.limit_s = minutes, 60 * minutes
        self.tick_s = min(10.0, self.limit_s / 20)
        self.working_s = min(0.25, self.limit_s / 20)  # of the processor, more than watching takes
        self.what: What | None = None
        self.count = 0
        self._before: Any = None  # what SIGTSTP did
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def doing(self, what: What | None) -> None:
        """Note what begins now, what was before being done; nothing is watched in None."""
        self.what = what
        self.count += 1

    def start(self) -> None:
        """Begin to watch."""
        if self.limit_s <= 0:
            return
        if threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGTSTP"):
            self._before = signal.signal(signal.SIGTSTP, _pause)
        self._thread.start()

    def close(self) -> None:
        """Watch no more."""
        self._ended.set()
        if self._before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTSTP, self._before)
            self._before = None
        if self._thread.is_alive():
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        seen, idle_s = -1, 0.0
        last, computed = time.monotonic(), time.process_time()
        while not self._ended.wait(self.tick_s):
            now = time.monotonic()
            # A process that was stopped did not hang: this thread was stopped as well.
            idle_s += min(now - last, 2 * self.tick_s)
            last = now
            what, count = self.what, self.count
            at_work = what in _LONG and time.process_time() - computed > self.working_s
            if what is None or count != seen or at_work:
                seen, idle_s, computed = count, 0.0, time.process_time()
            if what is not None and idle_s >= self.limit_s:
                self._end(what)
            self._set_timer(idle_s if what else None)

    def _set_timer(self, idle_s: float | None) -> None:
        faulthandler.cancel_dump_traceback_later()
        if idle_s is not None:
            left_s = self.limit_s * _MORE - idle_s + 2 * self.tick_s
            faulthandler.dump_traceback_later(left_s, exit=True, file=2)

    def _end(self, what: What) -> None:
        line = (
            f"error: nothing was done for {self.minutes:g} minutes (train.timeout_minutes) while "
            f"{_SAY[what]}; the same command continues from the newest checkpoint\n"
        )
        with contextlib.suppress(OSError):  # of a reader that ended
            os.write(2, line.encode())
        faulthandler.dump_traceback(2)
        os._exit(1)


def _pause(number: int, frame: FrameType | None) -> None:
    # The timer, unlike the thread, would count the time that the process is stopped for.
    faulthandler.cancel_dump_traceback_later()
    os.kill(os.getpid(), signal.SIGSTOP)
