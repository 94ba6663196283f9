"""Command lines by argparse that report a mistake in one line and exit with code 2."""

from __future__ import annotations

import argparse
import itertools
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from dgm.common.errors import UserError
from dgm.common.suggestions import nearest

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


def _options(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _options(command)
