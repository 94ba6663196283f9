"""Suggestions for misspelled names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(unknown: str, known: Iterable[str], cutoff: float = 0.8) -> str | None:
    """Return a known name that begins with an unknown one or is similar to it."""
    known = list(known)
    longer = [name for name in known if name.startswith(unknown)]
    return next(iter(longer or difflib.get_close_matches(unknown, known, 1, cutoff)), None)


def did_you_mean(unknown: str, known: Iterable[str]) -> str:
    """Return `did you mean X? ` for a name similar to a known one, ignoring case, else ''."""
    lower = {name.lower(): name for name in known}
    near = nearest(unknown.lower(), lower, cutoff=0.6)
    return f"did you mean {lower[near]}? " if near else ""
