"""Requests to stop that reach a trainer while it is still importing its libraries."""

from __future__ import annotations

import contextlib
import os
import signal
from types import FrameType
from typing import NoReturn


def watch_early() -> None:
    """End with code 75 and one line at a request to stop, until the trainer itself watches.

    Importing torch takes seconds, in which Ctrl-C would show a traceback.
    """
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:  # as nohup does
            signal.signal(number, _end)


def unwatch() -> None:
    """Put Python's own handlers back: a run that failed is not one that was stopped early."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is _end:
            is_int = number == signal.SIGINT
            signal.signal(number, signal.default_int_handler if is_int else signal.SIG_DFL)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    if (os.environ.get("RANK") or "0") == "0":
        with contextlib.suppress(OSError):
            os.write(1, b"stopped before its first step: run the same command to continue\n")
    if path := os.environ.get("DGM_EXIT_CODES"):  # as launch/command.py leaves it
        with contextlib.suppress(OSError), open(path, "a", encoding="utf-8") as file:
            file.write("75\n")
    os._exit(75)
