"""Handle requests to stop while a trainer is still importing its libraries."""

from __future__ import annotations

import contextlib
import os
import signal
from types import FrameType
from typing import NoReturn


def watch_early() -> None:
    """Exit with code 75 and one line at a request to stop, until the trainer sets its handlers.

    Importing torch takes seconds, during which Ctrl-C would print a traceback.
    """
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:  # as nohup does
            signal.signal(number, _end)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    if (os.environ.get("RANK") or "0") == "0":
        with contextlib.suppress(OSError):
            os.write(1, b"stopped before its first step: run the same command to continue\n")
    if path := os.environ.get("DGM_EXIT_CODES"):  # as dgm/cli/entry.py does
        with contextlib.suppress(OSError), open(path, "a", encoding="utf-8") as file:
            file.write("75\n")
    os._exit(75)
