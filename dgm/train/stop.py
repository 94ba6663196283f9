"""Asking a run to stop: once it trains, signals set a flag, nothing more."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


class StopRequest:
    """Remember that SIGTERM, SIGINT or SIGUSR2 came; a second SIGINT interrupts at once.

    With `at_once` the first signal calls it, which ends the process, as long as there is nothing to
    save: until `only_note`.
    """

    def __init__(self, at_once: Callable[[], object] | None = None) -> None:
        """Watch, where this is the main thread (elsewhere no handler can be set)."""
        self.raised = False
        self.at_once = at_once
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._note) for s in SIGNALS}

    def only_note(self) -> None:
        """End the process at no signal from now on."""
        self.at_once = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.raised and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.raised = True
        if self.at_once is not None:
            self.at_once()

    def close(self) -> None:
        """Put back the handlers that were there before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
