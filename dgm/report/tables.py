"""Tables of a page: runs side by side, and the details of one run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from dgm.common.formatting import duration, number
from dgm.common.metric_registry import find_metric, higher_is_better
from dgm.report.evaluation_table import format_metric, format_with_spread
from dgm.report.read_run import ENERGY, SPREAD, Run, is_detail

# Parts of evaluation.json that describe how a metric was computed.
_SETTINGS = ("num_", "images_seen", "importance_samples", "first_seed", "timesteps_per_image")
NOTHING = "–"


@dataclass(frozen=True)
class Cell:
    """A cell of a table."""

    text: str
    numeric: bool = False  # aligned to the right
    best: bool = False  # the best of its column
    sort_value: str = ""


@dataclass(frozen=True)
class Table:
    """A table; one without `heads` lists names and values."""

    caption: str
    rows: list[list[Cell]]
    heads: list[Cell]
    row_names: bool = False  # the first cell of a row names it
    sortable: bool = False


@dataclass(frozen=True)
class Column:
    """A column of a sortable table: a value for each row, and its text."""

    name: str
    values: list[Any]  # None where a run has none
    texts: list[str]
    higher_is_better: bool | None = None  # None: neither direction is better

    def best(self) -> set[int]:
        """Return the rows with the best value, if there is something to compare."""
        known = [value for value in self.values if value is not None]
        if self.higher_is_better is None or len(set(known)) < 2:
            return set()
        best = max(known) if self.higher_is_better else min(known)
        return {row for row, value in enumerate(self.values) if value == best}

    def cells(self) -> list[Cell]:
        """Return the cells of the rows."""
        numeric, best = is_numeric(self.values), self.best()
        keys = ["" if v is None else v if isinstance(v, str) else as_text(v) for v in self.values]
        return [
            Cell(text, numeric, row in best, key)
            for row, (text, key) in enumerate(zip(self.texts, keys, strict=True))
        ]


def column(
    name: str,
    values: list[Any],
    as_text: Callable[[Any], str] = number,
    higher_is_better: bool | None = None,
) -> Column:
    """Return a column whose texts are those of its values."""
    texts = [NOTHING if value is None else as_text(value) for value in values]
    return Column(name, values, texts, higher_is_better)


def sortable(caption: str, columns: list[Column]) -> Table:
    """Return a table of columns, of which the first names the rows."""
    heads = [Cell(column.name, is_numeric(column.values)) for column in columns]
    rows = [list(row) for row in zip(*(column.cells() for column in columns), strict=True)]
    return Table(caption, rows, heads, row_names=True, sortable=True)


def listing(caption: str, heads: list[str], rows: list[list[Any]]) -> Table:
    """Return a table with heads; numbers are formatted as the metric that their head names."""
    numeric = [is_numeric([row[k] for row in rows]) for k in range(len(heads))]
    cells = [
        [Cell(_cell_text(head, value), right)
         for head, value, right in zip(heads, row, numeric, strict=True)]
        for row in rows
    ]  # fmt: skip
    return Table(caption, cells, [Cell(*head) for head in zip(heads, numeric, strict=True)])


def facts(caption: str, rows: Iterable[tuple[str, object]]) -> Table:
    """Return a table of names and values."""
    cells = [[Cell(name), Cell(str(value))] for name, value in rows]
    return Table(caption, cells, [], row_names=True)


def evaluation_tables(found: dict[str, Any], caption: str, metric: str = "") -> list[Table]:
    """Return tables of metrics, one for each dictionary, with notes on what each metric is.

    With `metric` the keys are classes or quartiles of it.
    """
    plain = {k: v for k, v in found.items() if not isinstance(v, dict | list) and k != "checkpoint"}
    rows = []
    for name, value in plain.items():
        text = format_metric(metric, value) if metric else format_with_spread(name, found)
        metric_info = find_metric(name)
        notes = [Cell(metric_info.protocol)] * any(find_metric(n).protocol for n in plain)
        rows.append([Cell(metric_info.label), Cell(text, numeric=True), *notes])
    tables = [Table(caption, rows, [], row_names=True)] if rows else []
    for name, value in found.items():
        if isinstance(value, dict) and name != SPREAD:
            protocol = find_metric(name).protocol
            title = name.replace("_", " ") + (f": {protocol}" if protocol else "")
            tables += evaluation_tables(value, title, name if is_detail(name) else metric)
    return tables


def table_of_runs(runs: list[Run]) -> Table:
    """Return the settings in which runs differ, and their results."""
    columns = [column("run", [run.name for run in runs], str)]
    if len({run.family for run in runs}) > 1:
        columns.append(column("family", [run.family for run in runs], str))
    for key in differing_keys(runs):
        columns.append(column(key, [run.config.get(key) for run in runs], as_text))
    columns += _results(runs)
    return sortable("Settings that differ, and results. The best of a column is shaded.", columns)


def differing_keys(runs: list[Run]) -> list[str]:
    """Return the keys in which runs differ; of several families, only keys that all runs have."""
    keys = list(dict.fromkeys(key for run in runs for key in run.config))
    if len({run.family for run in runs}) > 1:
        keys = [key for key in keys if all(key in run.config for run in runs)]
    return [
        key
        for key in keys
        if key != "run.dir" and len({as_text(run.config.get(key)) for run in runs}) > 1
    ]


def as_text(value: object) -> str:
    """Return a setting on one line, as in YAML."""
    if isinstance(value, str):
        return value
    return json.dumps(value, default=str, ensure_ascii=False)


def is_numeric(values: list[Any]) -> bool:
    """Return whether all known values of a column are numbers."""
    known = [value for value in values if value is not None]
    return bool(known) and all(type(value) in (int, float) for value in known)


def _results(runs: list[Run]) -> list[Column]:
    # Losses of different families measure different things.
    comparable = len({run.family for run in runs}) == 1
    columns = []
    for key in dict.fromkeys(key for run in runs for key in run.losses):
        columns += _over_training(key, runs, False if comparable else None)
    for key in dict.fromkeys(k for run in runs for k in run.keys if k.startswith("eval/")):
        columns += _over_training(key, runs, higher_is_better(key))
    results = [run.results() for run in runs]
    for name in dict.fromkeys(name for found in results for name in found):
        if not name.split("/")[-1].startswith(_SETTINGS):
            label = "/".join(find_metric(part).label for part in name.split("/"))
            values, format_one = [f.get(name) for f in results], partial(format_metric, name)
            columns.append(column(label, values, format_one, higher_is_better(name)))
    for key, covered in ENERGY.items():
        spent = [run.energy_kwh(key) for run in runs]
        columns += [column(f"kWh, {covered}", spent)] if is_numeric(spent) else []
    speeds = [run.median("time/images_per_s") for run in runs]
    return [
        *columns,
        column("images/s, median", speeds, higher_is_better=True),
        column("wall time", [run.wall_s() for run in runs], duration),
        column("images seen", [run.images_seen for run in runs]),
        column("state", [run.state for run in runs], str),
    ]


def _over_training(key: str, runs: list[Run], higher: bool | None) -> list[Column]:
    """Return the final value of a curve, its best, and the images seen there."""
    curves = [run.curve(key) for run in runs]
    best = [c.best(higher) if c.values else (None, None) for c in curves]
    word = "max" if higher else "min"
    final = [c.values[-1] if c.values else None for c in curves]
    return [
        column(f"{key}, final", final, higher_is_better=higher),
        column(f"{key}, {word}", [value for value, _ in best], higher_is_better=higher),
        column(f"{word} after images", [seen for _, seen in best]),
    ]


def _cell_text(head: str, value: object) -> str:
    return NOTHING if value is None else format_metric(head, value)
