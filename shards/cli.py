"""Running a command of this package: its exit codes, signals and disk faults."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from dgm.common.atomic_dirs import remove_unfinished
from dgm.common.errors import UserError, disk_fault
from dgm.common.streams import keep_streams

_SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]


def _stop(signum: int, _frame: FrameType | None) -> NoReturn:
    # Not by an exception: one raised at a random point can be swallowed, in a __del__ for example.
    for each in _SIGNALS:
        signal.signal(each, signal.SIG_IGN)  # a second signal must not interrupt the removal
    remove_unfinished()
    name = signal.Signals(signum).name
    with contextlib.suppress(OSError):  # of a terminal that is closed
        os.write(2, f"error: stopped by {name}; nothing half-written is left\n".encode())
    os._exit(128 + signum)


def run(command: Callable[[], None]) -> NoReturn:
    """Run a command and exit: 0 done, 2 a mistake or full disk in one line, 128 + n on signal n."""
    keep_streams()
    for signum in _SIGNALS:
        if signal.getsignal(signum) is not signal.SIG_IGN:  # as nohup lets SIGHUP be
            signal.signal(signum, _stop)
    try:
        command()
        sys.stdout.flush()  # into a file, on a disk that may be full
    except (UserError, OSError) as error:
        fault = disk_fault(error) if isinstance(error, OSError) else str(error)
        if fault is None:
            raise
        print("error: " + " ".join(fault.splitlines()), file=sys.stderr)
        sys.exit(2)
    sys.exit(0)
