"""A sweep: one file with named sets of hyperparameters, a grid of them, or both."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

from dgm.common.config_keys import flatten_nested
from dgm.common.errors import UserError
from dgm.common.yaml_io import read_yaml

MAX_RUNS = 10_000
Sets = dict[str, dict[str, Any]]
"""Keys and values of each run, by the name of the set."""
_NAME = re.compile(r"[A-Za-z0-9][\w.,=+-]*")


def read_sweep(path: Path) -> Sets:
    """Return the runs of `sets:` (name -> keys and values) and `grid:` (key -> list of values).

    With both, each set is combined with each point of the grid. Raise UserError where the file is
    not valid.
    """
    try:
        content = read_yaml(path)
    except UserError as error:
        raise UserError(f"sweep {error}") from None
    if not content or content.keys() - {"sets", "grid"}:
        raise UserError(f"sweep {path} needs the sections sets, grid or both, and no others")
    sets = _read_sets(path, content.get("sets", {"": {}}))
    grid = _read_grid(path, content["grid"]) if "grid" in content else {}
    count = len(sets) * math.prod(len(values) for values in grid.values())
    if count > MAX_RUNS:
        raise UserError(f"sweep {path} makes {count} runs: give {MAX_RUNS} or fewer")
    runs: Sets = {}
    points = (dict(zip(grid, point, strict=True)) for point in itertools.product(*grid.values()))
    for (set_name, keys), point in itertools.product(sets.items(), points):
        name = "-".join(filter(None, (set_name, _point_name(point))))
        if name in runs:
            raise UserError(f"sweep {path} names two sets {name}: write differing values")
        if not _NAME.fullmatch(name):
            raise UserError(
                f"sweep {path} has a set named {name!r}: a folder is named after it, so use "
                "letters, digits and . , = + - _"
            )
        runs[name] = {**keys, **point}
    return runs


def words_of(keys: dict[str, Any]) -> list[str]:
    """Return keys and values as the trainers' command-line options."""
    return [
        f"--{key}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in keys.items()
    ]


def _read_sets(path: Path, sets: Any) -> Sets:
    if not isinstance(sets, dict) or not sets:
        raise UserError(f"sweep {path}: sets is {sets!r}; give each set a name and its keys")
    for name, keys in sets.items():
        if not isinstance(keys, dict | None):
            raise UserError(f"sweep {path}: the set {name} is {keys!r}; give it keys and values")
    return {str(name): dict(flatten_nested(keys or {})) for name, keys in sets.items()}


def _read_grid(path: Path, grid: Any) -> dict[str, list[Any]]:
    if not isinstance(grid, dict) or not grid:
        raise UserError(f"sweep {path}: grid is {grid!r}; give keys, each with a list of values")
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise UserError(f"sweep {path}: {key} of the grid is {values!r}; give a list of values")
    return grid


def _point_name(point: dict[str, Any]) -> str:
    """Return the name of a grid point, from the last word of each key: lr=0.001-seed=1."""
    return "-".join(
        f"{key.split('.')[-1]}={re.sub(r'[^A-Za-z0-9.+_]+', '_', str(value)).strip('_')}"
        for key, value in point.items()
    )
