"""JSON files that may be damaged: what is no object, or beyond all bounds, is left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_MAX_DEPTH = 30
_MAX_DIGITS = 20  # of a whole number, lest what shows it fail


def as_object(text: str | bytes) -> dict[str, Any] | None:
    """Return a JSON object; None where a text is none, or nests or counts beyond all bounds."""
    try:
        found = json.loads(text, parse_int=_int)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and _is_flat(found, _MAX_DEPTH) else None


def read_objects(path: Path) -> list[dict[str, Any]]:
    """Return the JSON objects of a file of lines; empty where it cannot be read."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return []
    return [found for line in lines if (found := as_object(line)) is not None]


def _int(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError("beyond all bounds")
    return int(digits)


def _is_flat(found: object, depth: int) -> bool:
    inside = found.values() if isinstance(found, dict) else found if isinstance(found, list) else ()
    return depth > 0 and all(_is_flat(part, depth - 1) for part in inside)
