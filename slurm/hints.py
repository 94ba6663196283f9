"""Which option was meant by one that there is not."""

from __future__ import annotations

import difflib
import re

_KINDS = {"int": "a whole number (int)", "bool": "true or false"}


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
