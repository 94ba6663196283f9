"""A sweep: one file that names sets of hyperparameters, a grid of them, or both."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

from dgm.common.errors import UserError
from dgm.common.yaml_io import read_yaml

MOST_RUNS = 10_000
Sets = dict[str, dict[str, Any]]
_NAME = re.compile(r"[A-Za-z0-9][\w.,=+-]*")


def read_sweep(path: Path) -> Sets:
    """Read `sets:` (a name -> keys and values) and `grid:` (key -> list of values).

    With both, each set is tried with each point of the grid. Raises UserError.
    """
    try:
        found = read_yaml(path)
    except UserError as error:
        raise UserError(f"sweep {error}") from None
    if not found or found.keys() - {"sets", "grid"}:
        raise UserError(f"sweep {path} needs the sections sets, grid or both, and no others")
    sets = _read_sets(path, found.get("sets", {"": {}}))
    grid = _read_grid(path, found["grid"]) if "grid" in found else {}
    count = len(sets) * math.prod(len(values) for values in grid.values())
    if count > MOST_RUNS:
        raise UserError(f"sweep {path} makes {count} runs: give {MOST_RUNS} or fewer")
    whole: Sets = {}
    points = (dict(zip(grid, point, strict=True)) for point in itertools.product(*grid.values()))
    for (name, keys), point in itertools.product(sets.items(), points):
        where = "-".join(filter(None, (name, _point_name(point))))
        if where in whole:
            raise UserError(f"sweep {path} names two sets {where}: write differing values")
        whole[where] = {**keys, **point}
    for name in whole:
        if not _NAME.fullmatch(name):
            raise UserError(
                f"sweep {path} has a set named {name!r}: a folder is named after it, so use "
                "letters, digits and . , = + - _"
            )
    return whole


def words_of(keys: dict[str, Any]) -> list[str]:
    """Write keys and values as the trainers' options."""
    return [
        f"--{key}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in keys.items()
    ]


def _read_sets(path: Path, sets: Any) -> Sets:
    if not isinstance(sets, dict) or not sets:
        raise UserError(f"sweep {path}: sets is {sets!r}; give each set a name and its keys")
    read = {}
    for name, keys in sets.items():
        if not isinstance(keys, dict | None):
            raise UserError(f"sweep {path}: the set {name} is {keys!r}; give it keys and values")
        read[str(name)] = _flat(keys or {})
    return read


def _read_grid(path: Path, grid: Any) -> dict[str, list[Any]]:
    if not isinstance(grid, dict) or not grid:
        raise UserError(f"sweep {path}: grid is {grid!r}; give keys, each with a list of values")
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise UserError(f"sweep {path}: {key} of the grid is {values!r}; give a list of values")
    return grid


def _flat(keys: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Let `optim: {lr: 1}` mean `optim.lr: 1`, as configurations are written."""
    flat: dict[str, Any] = {}
    for key, value in keys.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _point_name(point: dict[str, Any]) -> str:
    """Name a point of the grid by the last word of each key: lr=0.001-seed=1."""
    return "-".join(
        f"{key.split('.')[-1]}={re.sub(r'[^A-Za-z0-9.+_]+', '_', str(value)).strip('_')}"
        for key, value in point.items()
    )
