"""Command lines that report a mistake in one line and exit with code 2."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from shards.errors import ShardError, disk_fault
from shards.folders import remove_unfinished


class Parser(argparse.ArgumentParser):
    """Parse arguments; a mistake prints `error: ...` in one line and exits with code 2."""

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with code 2."""
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def _stop(signum: int, _frame: FrameType | None) -> NoReturn:
    # Not by an exception: one raised at a random point can be swallowed, in a __del__ for example.
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)  # a second signal must not interrupt the removal
    remove_unfinished()
    name = signal.Signals(signum).name
    os.write(2, f"error: stopped by {name}; nothing half-written is left\n".encode())
    os._exit(128 + signum)


def run(command: Callable[[], None]) -> NoReturn:
    """Run a command and exit: 0 done, 2 a mistake or full disk in one line, 128 + n on signal n."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, _stop)
    try:
        command()
    except (ShardError, OSError) as error:
        fault = disk_fault(error) if isinstance(error, OSError) else str(error)
        if fault is None:
            raise
        print("error: " + " ".join(fault.splitlines()), file=sys.stderr)
        sys.exit(2)
    sys.exit(0)
