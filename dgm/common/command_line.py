"""An argparse parser and a runner of commands: a mistake is one line and exit code 2."""

from __future__ import annotations

import argparse
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from dgm.common.errors import UserError, disk_fault, one_line
from dgm.common.exit_codes import DONE, MISTAKE
from dgm.common.streams import keep_streams
from dgm.common.suggestions import nearest

_MAX_FLOAT = 3.4e38  # the largest float32


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Run a command and exit with its return value, or 2 after a mistake or a disk error."""
    keep_streams()
    sys.exit(exit_code(main, lambda line: print(line, file=sys.stderr)))


def exit_code(main: Callable[[], int | None], show: Callable[[str], None]) -> int:
    """Return a command's exit code, 2 after a mistake or disk error; `show` gets the error line."""
    try:
        code = main() or DONE
        sys.stdout.flush()  # here, so that a full disk is a one-line error
        return code
    except (UserError, OSError) as error:
        fault = disk_fault(error) if isinstance(error, OSError) else str(error)
        if fault is None:
            raise
        show(f"error: {one_line(fault)}")
        return MISTAKE


class Parser(argparse.ArgumentParser):
    """Parse arguments; a mistake prints `error: ...` in one line and exits with code 2."""

    def __init__(self, **options: Any):
        super().__init__(**options, allow_abbrev=False)

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """Parse; also reject empty values, and numbers that are not finite or too large."""
        words = sys.argv[1:] if args is None else list(args)
        for before, word in itertools.pairwise(["", *words]):
            option = before if not word else word[:-1]
            if option.startswith("--") and word in ("", f"{option}="):
                self.error(f"{option} is '': {remedy_for('')}")
        values = super().parse_args(args, namespace)
        for name, value in vars(values).items():
            option = f"--{name.replace('_', '-')}"
            if isinstance(value, list):
                setattr(values, name, [self._checked(option, each) for each in value])
            else:
                setattr(values, name, self._checked(option, value))
        return values

    def _checked(self, option: str, value: Any) -> Any:
        """Return a value, with ~ expanded in a path; exit if no option accepts it."""
        if remedy := remedy_for(str(value) if isinstance(value, Path) else value, option[2:]):
            self.error(f"{option} is {value}: {remedy}")
        try:
            return Path(expand_home(option, str(value))) if isinstance(value, Path) else value
        except UserError as error:
            self.exit(MISTAKE, f"error: {error}\n")

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with code 2."""
        unknown = re.match(r"unrecognized arguments: (--[^ =]+)", message)
        near = nearest(unknown[1], _options(self)) if unknown else None
        hint = f"did you mean {near}?" if near else f"see {self.prog} --help"
        self.exit(MISTAKE, f"error: {message}; {hint}\n")


def remedy_for(value: object, name: str = "") -> str | None:
    """Return the remedy for a value that no option accepts; None for any other."""
    if isinstance(value, str) and not value.strip():
        return "give a value, or leave it out"
    if isinstance(value, str) and ("\0" in value or not _is_utf8(value)):
        return "give UTF-8 text without zero bytes"
    if isinstance(value, float) and not abs(value) <= _MAX_FLOAT:
        return f"give a number of magnitude at most {_MAX_FLOAT}"
    if not isinstance(value, int):
        return None
    if name.split(".")[-1] == "seed":
        return None if 0 <= value < 2**64 else "choose 0 or more, below 2**64"
    return None if abs(value) < 2**63 else "choose a number below 2**63"


def expand_home(name: str, path: str) -> str:
    """Return a path with a leading ~ expanded, also after `folder:`.

    Raise UserError naming the option `name` if that home folder is unknown.
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
    """Return a path with ~ expanded; the argparse type of paths and addresses."""
    try:
        return expand_home("the path", text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _is_utf8(text: str) -> bool:
    # Python decodes other bytes of a command line to surrogates (PEP 383).
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _options(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _options(command)
