"""Reading JSON that may be damaged: only objects with limits on depth and digits are accepted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_MAX_DEPTH = 30
_MAX_DIGITS = 20  # per integer; Python cannot print very long ones


def as_object(text: str | bytes) -> dict[str, Any] | None:
    """Return a JSON object; None if the text holds none, or exceeds the limits above."""
    try:
        found = json.loads(text, parse_int=_int)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and _is_flat(found, _MAX_DEPTH) else None


def read_object(path: Path) -> dict[str, Any] | None:
    """Return the JSON object of a file; None if it holds none or cannot be read."""
    try:
        return as_object(path.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return None


def read_objects(path: Path) -> list[dict[str, Any]]:
    """Return the JSON objects of a JSONL file; empty if it cannot be read."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return []
    return [found for line in lines if (found := as_object(line)) is not None]


def _int(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError("too many digits")
    return int(digits)


def _is_flat(found: object, depth: int) -> bool:
    inside = found.values() if isinstance(found, dict) else found if isinstance(found, list) else ()
    return depth > 0 and all(_is_flat(part, depth - 1) for part in inside)
