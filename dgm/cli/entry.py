"""Run a script: one-line errors, exit codes, signals, streams and warnings."""

from __future__ import annotations

import contextlib
import getpass
import importlib
import logging
import os
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NoReturn, TextIO

from dgm.common.command_line import exit_code
from dgm.common.errors import disk_fault, one_line
from dgm.common.exit_codes import STOPPED
from dgm.common.streams import keep_streams
from dgm.training.stop_request import SIGNALS, watched_signals
from shards.cli import set_option_format

_is_script = False  # whether `run` was called


def run_script(path: str) -> NoReturn:
    """Run a script of launch/: `main` of the module of dgm.cli with the same name."""
    name = Path(path).stem
    if name.startswith("train_"):
        stop_at_signals()
    run(importlib.import_module(f"dgm.cli.{name}").main)


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run a script: 0 done, 75 stopped after saving, 2 the user's mistake, 1 anything else.

    The process exits, so streams, warnings and hooks are changed permanently.
    """
    global _is_script
    _is_script = True
    keep_streams()
    _set_cache_folders()
    warnings.showwarning = _show_warning
    set_option_format(_as_key)
    # On a machine without a GPU this module warns that the CUDA toolkit is not used.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    _hide_disk_faults_of_helpers()
    try:
        code = exit_code(main, _print_error)
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    _record_code(code)
    sys.exit(code)


def _as_key(option: str) -> str:
    """Return the trainers' key for an option of `python -m shards.build`."""
    name, *value = option.removeprefix("--").split(" ")
    key = " ".join([f"--data.{name.replace('-', '_')}", *value])
    return f'ARGS="{key}"' if os.environ.get("DGM_MAKE") else key


def _set_cache_folders() -> None:
    # In a container, a user may have neither a name, which torch's compiler needs, nor a home.
    base = Path(os.environ.get("XDG_CACHE_HOME") or tempfile.gettempdir())
    own = f"-{os.getuid()}"
    try:
        getpass.getuser()
    except (KeyError, ImportError, OSError):
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(base / f"torchinductor{own}"))
    if os.path.expanduser("~") == "~":
        os.environ.setdefault("TRITON_HOME", str(base / f"triton{own}"))
        os.environ.setdefault("MPLCONFIGDIR", str(base / f"matplotlib{own}"))


def stop_at_signals() -> None:
    """Exit with code 75 and one line at a request to stop, until the trainer sets its handlers.

    Importing torch takes seconds, during which Ctrl-C would print a traceback.
    """
    for number in watched_signals():
        signal.signal(number, _stop_early)


def _stop_early(number: int, frame: FrameType | None) -> None:
    exit_before_first_step()


def restore_signals() -> None:
    """Restore Python's handlers of signals that `stop_at_signals` handles."""
    for number in SIGNALS:
        if signal.getsignal(number) is _stop_early:
            is_int = number == signal.SIGINT
            signal.signal(number, signal.default_int_handler if is_int else signal.SIG_DFL)


def exit_before_first_step() -> NoReturn:
    """Exit a trainer that has nothing to save yet, from a signal handler.

    An exception could be swallowed, in a __del__ for example.
    """
    _ignore_signals()
    with contextlib.suppress(RuntimeError, OSError):  # a write may be in progress
        sys.stdout.flush()
    if (os.environ.get("RANK") or "0") == "0":
        with contextlib.suppress(OSError):
            os.write(1, b"stopped before its first step: run the same command to continue\n")
    _record_code(STOPPED)
    os._exit(STOPPED)


def ignore_signals_at_exit(restore: Callable[[], object]) -> None:
    """Ignore further signals if `run` exits next, as all is saved; else call `restore`."""
    if _is_script:
        _ignore_signals()
    else:
        restore()


def _ignore_signals() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _hide_disk_faults_of_helpers() -> None:
    # On a full disk, a tracker's thread or the closing of a file by garbage collection fails, too;
    # the main thread reports the fault as a one-line error.
    in_thread, in_del = threading.excepthook, sys.unraisablehook

    def of_thread(args: threading.ExceptHookArgs) -> None:
        if args.exc_value is None or disk_fault(args.exc_value) is None:
            in_thread(args)

    def of_del(args: sys.UnraisableHookArgs) -> None:
        if args.exc_value is None or disk_fault(args.exc_value) is None:
            in_del(args)

    threading.excepthook, sys.unraisablehook = of_thread, of_del


def _record_code(code: int) -> None:
    # A launcher of several processes returns only one code, possibly of a process that it killed.
    path = os.environ.get("DGM_EXIT_CODES")
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"{code}\n")


def _print_error(line: str) -> None:
    # Most mistakes occur on all processes: the first one prints, and when it exits the launcher
    # terminates the others. A process that fails alone is still alive after 10 s, and prints then.
    if (os.environ.get("RANK") or "0") != "0":
        time.sleep(10)  # the first process may be slower by seconds on a loaded machine
    print(line, file=sys.stderr, flush=True)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print our own warnings as one line, without the source line that raised them."""
    root = Path(__file__).resolve().parents[2]
    packages = [root / name for name in ("dgm", "launch", "shards", "slurm")]
    if any(Path(filename).resolve().is_relative_to(package) for package in packages):
        print(f"warning: {one_line(str(message))}", file=sys.stderr)
