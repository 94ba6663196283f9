"""Conversion between nested configurations and dotted keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

MAY_CHANGE = {"may_change": True}
"""Field metadata of keys that may change when a run is resumed."""
PATH = {"path": True}
"""Field metadata of keys that are paths, in which ~ is the home folder."""


def flatten(
    config: object, prefix: str = "", free: bool = False
) -> Iterator[tuple[str, Any, bool]]:
    """Yield (dotted key, value, may change) of nested dataclasses."""
    for f in dataclasses.fields(config):  # type: ignore[arg-type]
        value, key = getattr(config, f.name), prefix + f.name
        may_change = free or bool(f.metadata.get("may_change"))
        if dataclasses.is_dataclass(value):
            yield from flatten(value, key + ".", may_change)
        else:
            yield key, list(value) if isinstance(value, tuple) else value, may_change


def flatten_nested(nested: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of nested dictionaries."""
    for key, value in nested.items():
        if isinstance(value, dict):
            yield from flatten_nested(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    """Return dotted keys and their values as nested dictionaries."""
    root: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, last = key.split(".")
        node = root
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = value
    return root
