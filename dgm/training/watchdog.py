"""End a process that hangs, printing what it was doing and the stacks of all threads."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import threading
import time
from types import FrameType
from typing import Any, Literal

Activity = Literal["data", "step", "save", "sample", "eval", "start", "prepare"]

_DESCRIPTIONS: dict[Activity, str] = {
    "data": "waiting for data: look at the disk or network that data.shards lies on",
    "step": "in a step: look at the other processes, and at the device",
    "save": "saving: look at the disk of run.dir",
    "sample": "making samples: look at the other processes, and at the device",
    "eval": "measuring: look at the other processes, and at the device",
    "start": "reading the run folder: look at the disk of run.dir and at the other processes",
    "prepare": "opening or building shards: look at the disk or network that they lie on",
}
# Activities that may take hours: they are not hanging while the process uses the processor.
_LONG = ("save", "sample", "eval", "start", "prepare")

# A process that hangs in a page fault of a mapped file holds the GIL, so the watchdog's thread
# cannot run. Then faulthandler's timer ends it a little later, printing only the stacks.
_TIMER_FACTOR = 1.1


class Watchdog:
    """Watch progress from a thread; reporting progress costs a step two assignments."""

    def __init__(self, minutes: float):
        """End the process after `minutes` without progress; 0: never."""
        self.minutes, self.limit_s = minutes, 60 * minutes
        self.tick_s = min(10.0, self.limit_s / 20)
        self.working_s = min(0.25, self.limit_s / 20)  # processor time, more than watching takes
        self.activity: Activity | None = None  # before the first one nothing is watched
        self.count = 0
        self._before: Any = None  # the handler of SIGTSTP
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def set_activity(self, activity: Activity) -> None:
        """Set the activity that begins now; the previous one is finished."""
        self.activity = activity
        self.count += 1

    def start(self) -> None:
        """Start watching."""
        if self.limit_s <= 0:
            return
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTSTP, _pause)
        self._thread.start()

    def close(self) -> None:
        """Stop watching."""
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
            # The time of a stopped process does not count: this thread was stopped as well.
            idle_s += min(now - last, 2 * self.tick_s)
            last = now
            activity, count = self.activity, self.count
            is_computing = activity in _LONG and time.process_time() - computed > self.working_s
            if activity is None or count != seen or is_computing:
                seen, idle_s, computed = count, 0.0, time.process_time()
            if activity is not None and idle_s >= self.limit_s:
                self._end(activity)
            self._set_timer(idle_s if activity else None)

    def _set_timer(self, idle_s: float | None) -> None:
        faulthandler.cancel_dump_traceback_later()
        if idle_s is not None:
            left_s = self.limit_s * _TIMER_FACTOR - idle_s + 2 * self.tick_s
            faulthandler.dump_traceback_later(left_s, exit=True, file=2)

    def _end(self, activity: Activity) -> None:
        line = (
            f"error: nothing was done for {self.minutes:g} minutes (train.timeout_minutes) while "
            f"{_DESCRIPTIONS[activity]}; the same command continues from the newest checkpoint\n"
        )
        with contextlib.suppress(OSError):  # the reader has ended
            os.write(2, line.encode())
        faulthandler.dump_traceback(2)
        os._exit(1)


def _pause(number: int, frame: FrameType | None) -> None:
    # Unlike the thread, the timer would count the time during which the process is stopped.
    faulthandler.cancel_dump_traceback_later()
    os.kill(os.getpid(), signal.SIGSTOP)
