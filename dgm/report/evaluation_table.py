"""What `evaluation.json` holds, in words and in a table on the screen."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

from dgm.common.metric_registry import find_metric, is_fraction
from dgm.report.formatting import figure
from dgm.report.read_run import SPREAD, is_detail

_ABOUT = ("checkpoint", "images_seen")


def shown(name: str, found: dict[str, Any]) -> str:
    """Write a figure of a measure, with its spread over seeds."""
    text, spreads = figure(name, found[name]), found.get(SPREAD, {})
    spread = spreads.get(name) if isinstance(spreads, dict) else None
    if not isinstance(spread, int | float):
        return text
    share = is_fraction(name)
    return f"{text} ± {100 * spread if share else spread:.2g}{' %' * share}"


def table(runs: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Lay out the figures of runs side by side, line by line; what is the same for all once."""
    names = list(dict.fromkeys(name for found in runs.values() for name in found))
    wide = max(18, *(len(name) + 2 for name in runs))
    yield _line("", list(runs), wide)
    yield _line("images seen", [f"{found['images_seen']:,}" for found in runs.values()], wide)
    for name in names:
        if name not in _ABOUT:
            found = [run.get(name, {}) for run in runs.values()]
            yield from ("", name.replace("_", " "), *_rows(found, wide))


def _rows(found: list[dict[str, Any]], wide: int) -> Iterator[str]:
    names = list(dict.fromkeys(name for measure in found for name in measure))
    names = [name for name in names if not _is_list(name, found)]
    told = [name for name in names if _is_setting(name, found) and _alike(name, found)]
    first = "; ".join(f"{find_metric(name).label} {_cell(name, found[0][name])}" for name in told)
    yield from textwrap.wrap(first, 100, initial_indent="  ", subsequent_indent="  ")
    for name in (name for name in names if name not in told):
        metric = find_metric(name)
        parts = [value if isinstance(value := m.get(name), dict) else {} for m in found]
        if any(parts):
            yield f"  {metric.label}" + (f": {metric.protocol}" if metric.protocol else "")
            for part in dict.fromkeys(part for own in parts for part in own):
                yield _line(f"    {part}", [_cell(name, own.get(part)) for own in parts], wide)
        else:
            cells = [shown(name, m) if name in m else "–" for m in found]
            yield _line(f"  {metric.label}", cells, wide, metric.protocol)


def _is_list(name: str, found: list[dict[str, Any]]) -> bool:
    return name == SPREAD or any(isinstance(measure.get(name), list) for measure in found)


def _is_setting(name: str, found: list[dict[str, Any]]) -> bool:
    values = [measure[name] for measure in found if name in measure]
    return not is_detail(name) and all(isinstance(value, int | str) for value in values)


def _alike(name: str, found: list[dict[str, Any]]) -> bool:
    return len({str(measure.get(name)) for measure in found}) == 1


def _cell(name: str, value: object) -> str:
    return "–" if value is None else figure(name, value)


def _line(first: str, cells: list[str], wide: int, note: str = "") -> str:
    return (
        f"{first:40}" + "".join(f" {cell:>{wide - 1}}" for cell in cells) + f"  {note}"
    ).rstrip()
