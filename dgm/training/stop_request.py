"""Asking a run to stop: once it trains, signals set a flag, nothing more."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType

SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGTERM", "SIGINT", "SIGUSR2", "SIGHUP")
    if hasattr(signal, name)  # not every system has all
)


def watched_signals() -> list[signal.Signals]:
    """Return the signals that ask this process to stop: without SIGHUP where it is ignored."""
    hup = getattr(signal, "SIGHUP", None)
    ignored = hup is not None and signal.getsignal(hup) is signal.SIG_IGN
    return [number for number in SIGNALS if not (ignored and number == hup)]


class StopRequest:
    """Remember that SIGTERM, SIGINT, SIGUSR2 or SIGHUP came; a second SIGINT interrupts at once.

    A SIGHUP that is ignored, as under nohup, stays ignored.

    With `at_once` the first signal calls it, which ends the process, as long as there is nothing to
    save: until `only_note`.
    """

    def __init__(self, at_once: Callable[[], object] | None = None) -> None:
        """Watch, where this is the main thread (elsewhere no handler can be set)."""
        self.raised = False
        self._interrupts = 0
        self.at_once = at_once
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._note) for s in watched_signals()}

    def only_note(self) -> None:
        """End the process at no signal from now on."""
        self.at_once = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            raise KeyboardInterrupt
        self.raised = True
        if self.at_once is not None:
            self.at_once()

    def close(self) -> None:
        """Put back the handlers that were there before."""
        for number, handler in self._before.items():
            # None: it was set by a library in C, and cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
