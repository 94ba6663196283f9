"""`accelerate launch` with the exit code of its processes and no traceback of its own.

Accelerate's own launcher turns every exit code into 1 and prints a traceback below the trainer's
message. On Ctrl-C it exits while its process is still saving, and torch's launcher, which starts
several processes, kills those that need more than 30 seconds to save.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from types import FrameType

import psutil

from dgm.training.stop_request import watched_signals

# Signals that torch's launcher handles; its handlers would replace ours, so it gets SIGQUIT only.
_TORCH_SIGNALS = "PET_SIGNALS_TO_HANDLE"


def launch(words: list[str]) -> int:
    """Start processes as `accelerate launch` would with these arguments; return the exit code.

    Requests to stop are passed on, and there is no time limit for saving.
    """
    from accelerate.commands import launch as accelerate
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    options = accelerate.launch_command_parser().parse_args(words)
    options.quiet = False  # quiet mode would hide the exit code
    os.environ[_TORCH_SIGNALS] = "SIGQUIT"
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    for number in watched_signals():
        signal.signal(number, _pass_on)
    try:
        accelerate.launch_command(options)
    except subprocess.CalledProcessError as error:
        return _code(error.returncode, "the process")
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        return _code(failure.exitcode, f"the process of rank {rank}")
    except (ValueError, OSError) as error:  # invalid arguments of the launcher
        print(f"error: accelerate launch: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _pass_on(number: int, frame: FrameType | None) -> None:
    children = psutil.Process().children()
    if not children:
        sys.exit(128 + number)
    for child in children:
        # A terminal sends Ctrl-C to the whole session; a second SIGINT would interrupt the save.
        already_sent = number == signal.SIGINT and _same_session(child.pid)
        try:
            child.send_signal(signal.SIGTERM if already_sent else number)
        except psutil.NoSuchProcess:
            continue


def _same_session(pid: int) -> bool:
    try:
        return os.getsid(pid) == os.getsid(0)
    except ProcessLookupError:
        return False


def _code(code: int, who: str) -> int:
    """Return the exit code that a shell would; print a signal other than SIGINT and SIGTERM."""
    if code >= 0:
        return code
    name = signal.Signals(-code).name
    if -code not in (signal.SIGINT, signal.SIGTERM):
        print(
            f"error: {who} was ended by {name}: look at what it printed, or whether the machine "
            "ran out of memory (dmesg), and run the same command to continue",
            file=sys.stderr,
        )
    return 128 - code
