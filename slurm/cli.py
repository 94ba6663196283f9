"""What is said of a command line that cannot be understood."""

from __future__ import annotations

import argparse
import difflib
import os
import re
from pathlib import Path
from typing import Any, NoReturn

from dgm.common.errors import UserError

_KINDS = {
    "int": "a whole number (int)", "bool": "true or false", "str": "a text",
    "list": "a list, as [a, b]", "dict": "keys and values, as {a: b}",
}  # fmt: skip


class Parser(argparse.ArgumentParser):
    """Parse arguments; a mistake prints `error: ...` in one line and exits with code 2."""

    def __init__(self, **options: Any):
        super().__init__(**options, allow_abbrev=False)

    def parse_args(self, *given: Any, **named: Any) -> Any:
        """Parse; in paths ~ is the home folder."""
        found = super().parse_args(*given, **named)
        for name, value in vars(found).items():
            if isinstance(value, Path):
                try:
                    setattr(found, name, Path(expand_home(name, str(value))))
                except UserError as error:
                    self.exit(2, f"error: {error}\n")
        return found

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with code 2."""
        known = [option for action in self._actions for option in action.option_strings]
        self.exit(2, f"error: {message}; {hint(message, known)}\n")


def expand_home(name: str, path: str) -> str:
    """Return a path in which a first ~ is the home folder; raises UserError if it is unknown."""
    whole = os.path.expanduser(path)
    if path.startswith("~") and whole == path:
        raise UserError(
            f"{name} is {path}, but the home folder {path.split('/')[0]} is unknown: write the "
            f"whole path, or ./{path} for one of that name"
        )
    return whole


def plainly(said: str, known: list[str]) -> str:
    """Say in our words what a parser found wrong, with what to do about it."""
    wrong = re.fullmatch(
        r'Parser key "([^"]+)": Expected an? <class \'(\w+)\'>\. Got value: (.*)', said
    )
    if wrong:
        key, kind, value = wrong.groups()
        return f"--{dashed(key)} is {value}: give {_KINDS.get(kind, kind)}"
    return f"{said}: {hint(said, known)}"


def hint(said: str, known: list[str]) -> str:
    """Name the option that was meant by an unknown one, else where to look."""
    unknown = re.search(r"unrecognized arguments: (--[^ =]+)", said)
    if unknown is None:
        return "see --help"
    word = dashed(unknown[1])
    options = [dashed(option) for option in known]
    longer = [option for option in options if option.startswith(word)]
    near = longer or difflib.get_close_matches(word, options, 1, cutoff=0.8)
    return f"did you mean {near[0]}?" if near else "see --help"


def dashed(option: str) -> str:
    """Write an option with dashes, as people do."""
    return option.replace("_", "-")
