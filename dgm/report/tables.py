"""Tables of runs side by side, and of what one run holds."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from dgm.common.formatting import duration, number
from dgm.common.metric_registry import find_metric, higher_is_better
from dgm.report.evaluation_table import shown
from dgm.report.formatting import figure
from dgm.report.markup import Html, element
from dgm.report.read_run import ENERGY, SPREAD, Run, is_detail

# How it was measured, no result.
_COUNTS = ("num_", "images_seen", "importance_samples", "first_seed", "timesteps_per_image")
_NOTHING = "–"


@dataclass(frozen=True)
class Column:
    """A column of a table: a value for each row, and how it is shown."""

    name: str
    values: list[Any]  # None where a run has none
    texts: list[str]
    higher: bool | None = None  # whether the higher value is the better; None: neither is

    def best(self) -> set[int]:
        """Number the rows with the best value, where there is something to compare."""
        known = [value for value in self.values if value is not None]
        if self.higher is None or len(set(known)) < 2:
            return set()
        best = max(known) if self.higher else min(known)
        return {row for row, value in enumerate(self.values) if value == best}


def table_of_runs(runs: list[Run]) -> Html:
    """Show what the runs were told differently and what came out; a click on a head sorts."""
    settings = [_settings(key, runs) for key in differing(runs)]
    columns = [Column("run", [r.name for r in runs], [r.name for r in runs])]
    if len({run.family for run in runs}) > 1:
        columns.append(Column("family", [r.family for r in runs], [r.family for r in runs]))
    columns += [*settings, *_results(runs)]
    return sortable("Settings that differ, and results. The best of a column is shaded.", columns)


def sortable(caption: str, columns: list[Column]) -> Html:
    """Show columns of as many values each; the first names the rows, a click on a head sorts."""
    best = [column.best() for column in columns]
    rows = [
        element("tr", *(_cell(c, row, row in best[k], k == 0) for k, c in enumerate(columns)))
        for row in range(len(columns[0].values))
    ]
    heads = [
        element(
            "th", element("button", c.name, type="button"), scope="col",
            class_="number" if _numeric(c.values) else None,
        )
        for c in columns
    ]  # fmt: skip
    table = element(
        "table",
        element("caption", caption),
        element("thead", element("tr", *heads)),
        element("tbody", *rows),
        class_="sortable",
    )
    return element("div", table, class_="scroll")


def differing(runs: list[Run]) -> list[str]:
    """Name the keys in which runs differ; of several families those that all of them have."""
    keys = list(dict.fromkeys(key for run in runs for key in run.config))
    if len({run.family for run in runs}) > 1:
        keys = [key for key in keys if all(key in run.config for run in runs)]
    return [
        key
        for key in keys
        if key != "run.dir" and len({as_text(run.config.get(key)) for run in runs}) > 1
    ]


def as_text(value: object) -> str:
    """Write a setting as in YAML, on one line."""
    if isinstance(value, str):
        return value
    return json.dumps(value, default=str, ensure_ascii=False)


def facts(caption: str, rows: Iterable[tuple[str, object]]) -> Html:
    """Make a table of names and values."""
    lines = [
        element("tr", element("th", name, scope="row"), element("td", value))
        for name, value in rows
    ]
    return element("table", element("caption", caption), element("tbody", *lines), class_="facts")


def listing(caption: str, heads: list[str], rows: list[list[object]]) -> Html:
    """Make a table with a head for each column; numbers are written by what their head says."""
    numeric = [_numeric([row[k] for row in rows]) for k in range(len(heads))]
    head = element(
        "tr",
        *(
            element("th", name, scope="col", class_="number" if right else None)
            for name, right in zip(heads, numeric, strict=True)
        ),
    )
    lines = [
        element(
            "tr",
            *(
                element("td", _said(name, value), class_="number" if right else None)
                for name, value, right in zip(heads, row, numeric, strict=True)
            ),
        )
        for row in rows
    ]
    table = element(
        "table",
        element("caption", caption),
        element("thead", head),
        element("tbody", *lines),
    )
    return element("div", table, class_="scroll")


def evaluation_tables(found: dict[str, Any], caption: str, share: str = "") -> list[Html]:
    """Show figures in tables, one for each dictionary, with what each is; shares in percent."""
    plain = {k: v for k, v in found.items() if not isinstance(v, dict | list) and k != "checkpoint"}
    explained = any(find_metric(name).protocol for name in plain)
    rows = [
        element(
            "tr", element("th", find_metric(name).label, scope="row"),
            element("td", figure(share, value) if share else shown(name, found), class_="number"),
            element("td", find_metric(name).protocol) if explained else None,
        )
        for name, value in plain.items()
    ]  # fmt: skip
    tables = (
        [element("table", element("caption", caption), element("tbody", *rows))] if rows else []
    )
    for name, value in found.items():
        if isinstance(value, dict) and name != SPREAD:
            protocol = find_metric(name).protocol
            title = name.replace("_", " ") + (f": {protocol}" if protocol else "")
            tables += evaluation_tables(value, title, name if is_detail(name) else share)
    return tables


def _settings(key: str, runs: list[Run]) -> Column:
    values = [run.config.get(key) for run in runs]
    return Column(key, values, [as_text(v) if v is not None else _NOTHING for v in values])


def _results(runs: list[Run]) -> list[Column]:
    # What a family minimises is no measure of another's.
    alike = len({run.family for run in runs}) == 1
    columns = []
    for key in dict.fromkeys(key for run in runs for key in run.losses):
        columns += _over_training(key, runs, False if alike else None)
    for key in dict.fromkeys(k for run in runs for k in run.keys if k.startswith("eval/")):
        columns += _over_training(key, runs, higher_is_better(key))
    results = [run.results() for run in runs]
    for name in dict.fromkeys(name for found in results for name in found):
        if not name.split("/")[-1].startswith(_COUNTS):
            values = [found.get(name) for found in results]
            texts = [_NOTHING if v is None else figure(name, v) for v in values]
            head = "/".join(find_metric(part).label for part in name.split("/"))
            columns.append(Column(head, values, texts, higher_is_better(name)))
    speeds = [run.median("time/images_per_s") for run in runs]
    walls = [run.wall_s() for run in runs]
    seen = [run.images_seen for run in runs]
    for key, covered in ENERGY.items():
        spent = [run.energy_kwh(key) for run in runs]
        if any(energy is not None for energy in spent):
            columns.append(Column(f"kWh, {covered}", spent, [_text(v) for v in spent]))
    return [
        *columns,
        Column("images/s, median", speeds, [_text(v) for v in speeds], True),
        Column("wall time", walls, [_NOTHING if w is None else duration(w) for w in walls]),
        Column("images seen", seen, [number(s) for s in seen]),
        Column("state", [r.state for r in runs], [r.state for r in runs]),
    ]


def _over_training(key: str, runs: list[Run], higher: bool | None) -> list[Column]:
    """Give the final value of a curve, its best, and where that was met."""
    curves = [run.curve(key) for run in runs]
    last = [curve.values[-1] if curve.values else None for curve in curves]
    best = [
        (curve.greatest() if higher else curve.least()) if curve.values else (None, None)
        for curve in curves
    ]
    values, seen = [value for value, _ in best], [where for _, where in best]
    word = "greatest" if higher else "least"
    return [
        Column(f"{key}, final", last, [_text(v) for v in last], higher),
        Column(f"{key}, {word}", values, [_text(v) for v in values], higher),
        Column(f"{word} after images", seen, [_text(s) for s in seen]),
    ]


def _said(name: str, value: object) -> object:
    if value is None:
        return _NOTHING
    return figure(name, value) if isinstance(value, int | float) else value


def _text(value: float | None) -> str:
    return _NOTHING if value is None else number(value)


def _cell(column: Column, row: int, best: bool, names_row: bool) -> Html:
    value = column.values[row]
    classes = ["number"] * _numeric(column.values) + ["best"] * best
    plain = value if isinstance(value, int | float | str) else as_text(value)
    return element(
        "th" if names_row else "td",
        column.texts[row],
        scope="row" if names_row else None,
        class_=" ".join(classes) or None,
        data_value="" if value is None else plain,
    )


def _numeric(values: list[Any]) -> bool:
    known = [value for value in values if value is not None]
    return bool(known) and all(type(value) in (int, float) for value in known)
