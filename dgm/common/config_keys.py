"""Conversion between nested configurations and dotted keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

MAY_CHANGE = {"may_change": True}
"""Field metadata of keys that may change when a run is resumed."""
PATH = {"path": True}
"""Field metadata of keys that are paths, in which ~ is the home folder."""


def flatten(config: object) -> dict[str, Any]:
    """Return the values of nested dataclasses by dotted key, tuples as lists."""
    values = {key: value for key, value, _ in _leaves(config)}
    return {k: list(value) if isinstance(value, tuple) else value for k, value in values.items()}


def marked_keys(config: object, mark: dict[str, bool]) -> list[str]:
    """Return the dotted keys whose field, or a section around it, has this metadata."""
    return [key for key, _, metadata in _leaves(config) if mark.items() <= metadata.items()]


def _leaves(
    config: object, prefix: str = "", around: Mapping[str, bool] | None = None
) -> Iterator[tuple[str, Any, Mapping[str, bool]]]:
    for f in dataclasses.fields(config):  # type: ignore[arg-type]
        value, key, metadata = (
            getattr(config, f.name),
            prefix + f.name,
            {**(around or {}), **f.metadata},
        )
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, key + ".", metadata)
        else:
            yield key, value, metadata


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
