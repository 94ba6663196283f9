"""Command lines that report a mistake in one line and exit with code 2."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import itertools
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from dgm.common.atomic_dirs import remove_unfinished
from dgm.common.errors import UserError, disk_fault
from dgm.common.streams import keep_streams

_SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]
_LARGEST = 3.4e38  # what float32 holds, in which most is computed


class Parser(argparse.ArgumentParser):
    """Parse arguments; a mistake prints `error: ...` in one line and exits with code 2."""

    def __init__(self, **options: Any):
        super().__init__(**options, allow_abbrev=False)

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """Parse; a mistake too where a word is empty, or a number is none or far too large."""
        words = sys.argv[1:] if args is None else list(args)
        for before, word in itertools.pairwise(["", *words]):
            option = before if not word else word[:-1]
            if option.startswith("--") and word in ("", f"{option}="):
                self.error(f"{option} is '': {remedy_for('')}")
        found = super().parse_args(args, namespace)
        for name, value in vars(found).items():
            for each in value if isinstance(value, list) else [value]:
                plain = str(each) if isinstance(each, Path) else each
                if remedy := remedy_for(plain, name):
                    self.error(f"--{name.replace('_', '-')} is {each}: {remedy}")
            setattr(found, name, self._expanded(name, value))
        return found

    def _expanded(self, name: str, value: Any) -> Any:
        """Return a value with ~ as the home folder where it is a path, or several."""
        if isinstance(value, list):
            return [self._expanded(name, each) for each in value]
        try:
            option = f"--{name.replace('_', '-')}"
            return Path(expand_home(option, str(value))) if isinstance(value, Path) else value
        except UserError as error:
            self.exit(2, f"error: {error}\n")

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with code 2."""
        unknown = re.match(r"unrecognized arguments: (--[^ =]+)", message)
        near = nearest(unknown[1], _options(self)) if unknown else None
        hint = f"did you mean {near}?" if near else f"see {self.prog} --help"
        self.exit(2, f"error: {message}; {hint}\n")


def remedy_for(value: object, name: str = "") -> str | None:
    """Say what to give instead of a value that no option takes; None where it is plain."""
    if isinstance(value, str) and not value.strip():
        return "give a value, or leave it out"
    if isinstance(value, str) and ("\0" in value or not _is_utf8(value)):
        return "give text of UTF-8, without zero bytes"
    if isinstance(value, float) and not abs(value) <= _LARGEST:
        return f"give a number, at most {_LARGEST} either way"
    if not isinstance(value, int):
        return None
    if name.split(".")[-1] == "seed":
        return None if 0 <= value < 2**64 else "choose 0 or more, below 2**64"
    return None if abs(value) < 2**63 else "choose a number below 2**63"


def expand_home(name: str, path: str) -> str:
    """Return a path in which a first ~ is the home folder, also behind `folder:`.

    Remote addresses and `pipe:` commands begin otherwise and stay as they are. Raises UserError
    naming the option `name` where nobody knows that home folder.
    """
    kind = "folder:" if path.startswith("folder:") else ""
    bare = path.removeprefix(kind)
    if not bare.startswith("~"):
        return path
    whole = os.path.expanduser(bare)
    if whole == bare:
        who = bare.split("/")[0]
        raise UserError(
            f"{name} is {path}, but the home folder {who} is unknown: write the whole path, or "
            f"./{bare} for a folder of that name"
        )
    return kind + whole


def home_path(text: str) -> str:
    """Return a path with ~ as the home folder: the argparse type of folders and addresses."""
    try:
        return expand_home("the path", text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _is_utf8(text: str) -> bool:
    # Other bytes of a command line become halves of surrogate pairs (PEP 383).
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def nearest(unknown: str, known: Iterable[str]) -> str | None:
    """Name the option that was meant by an unknown one, if one is like it."""
    known = list(known)
    longer = [option for option in known if option.startswith(unknown)]
    return next(iter(longer or difflib.get_close_matches(unknown, known, 1, cutoff=0.8)), None)


def _options(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _options(command)


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
