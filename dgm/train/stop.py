"""Asking a run to stop: signals set a flag, nothing more."""

from __future__ import annotations

import signal
import threading
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


class StopRequest:
    """Remember that SIGTERM, SIGINT or SIGUSR2 came; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        """Watch, where this is the main thread (elsewhere no handler can be set)."""
        self.raised = False
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._note) for s in _SIGNALS}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.raised and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.raised = True

    def close(self) -> None:
        """Put back the handlers that were there before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
