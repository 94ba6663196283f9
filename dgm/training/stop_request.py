"""Requests to stop by signal, which only set a flag once a run trains."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP)


def watched_signals() -> list[signal.Signals]:
    """Return the signals that request a stop: without SIGHUP if it is ignored, as by nohup."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [number for number in SIGNALS if not (ignored and number == signal.SIGHUP)]


class StopRequest:
    """Records SIGTERM, SIGINT, SIGUSR2 and SIGHUP; a second SIGINT interrupts immediately.

    Until `defer`, while there is nothing to save, a signal also calls `exit_now`, which ends the
    process. A SIGHUP that is ignored, as under nohup, stays ignored. Slurm sends SIGUSR2 to every
    process of a job step, also to compilers that this process starts: it is blocked, as children
    inherit it, and received by a thread of its own.
    """

    def __init__(self, exit_now: Callable[[], object] | None = None) -> None:
        """Set the handlers, if this is the main thread (others cannot)."""
        self.raised = False
        self._interrupts = 0
        self.exit_now = exit_now
        self._before = {}
        self._closed = threading.Event()
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._record) for s in watched_signals()}
            self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
            threading.Thread(target=self._receive, name="signals", daemon=True).start()

    def defer(self) -> None:
        """Only record signals from now on."""
        self.exit_now = None

    def _receive(self) -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR2])
        self._closed.wait()

    def _record(self, number: int, frame: FrameType | None) -> None:
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            raise KeyboardInterrupt
        self.raised = True
        if self.exit_now is not None:
            self.exit_now()

    def close(self) -> None:
        """Restore the previous handlers."""
        if self._before:
            signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
        self._closed.set()
        for number, handler in self._before.items():
            # None: a handler of a C library, which cannot be restored.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
