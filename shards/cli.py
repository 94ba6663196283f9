"""Running a command of this package, and the names of its options in messages."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from dgm.common.atomic_dirs import remove_unfinished
from dgm.common.command_line import run_command

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_option_format: Callable[[str], str] = str


def run(main: Callable[[], None]) -> NoReturn:
    """Run a command and exit, with code 128 + n after signal n; unfinished folders are removed."""
    for signum in _SIGNALS:
        if signal.getsignal(signum) is not signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(signum, _stop)
    run_command(main)


def _stop(signum: int, _frame: FrameType | None) -> NoReturn:
    # Not by an exception, which may be swallowed, in a __del__ for example.
    for each in _SIGNALS:
        signal.signal(each, signal.SIG_IGN)  # a second signal must not interrupt the removal
    remove_unfinished()
    name = signal.Signals(signum).name
    with contextlib.suppress(OSError):  # the terminal may be closed
        os.write(2, f"error: stopped by {name}; unfinished folders were removed\n".encode())
    os._exit(128 + signum)


def set_option_format(option_format: Callable[[str], str]) -> None:
    """Set how messages of this process show an option of `python -m shards.build`."""
    global _option_format
    _option_format = option_format


def option(name: str, value: str = "") -> str:
    """Return an option of `python -m shards.build` as the running command accepts it."""
    return _option_format(f"--{name} {value}".strip())
