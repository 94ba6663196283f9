"""Which option was meant by one that there is not."""

from __future__ import annotations

import difflib
import re


def hint(said: str, known: list[str]) -> str:
    """Name the option that was meant by an unknown one, else where to look."""
    unknown = re.search(r"unrecognized arguments: (--[^ =]+)", said)
    if unknown is None:
        return "see --help"
    word = dashed(unknown[1])
    options = [dashed(option) for option in known]
    longer = [option for option in options if option.startswith(word)]
    near = longer or difflib.get_close_matches(word, options, 1)
    return f"did you mean {near[0]}?" if near else "see --help"


def dashed(option: str) -> str:
    """Write an option with dashes, as people do."""
    return option.replace("_", "-")
