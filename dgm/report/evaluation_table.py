"""Names, notes, units and formatting of metrics; the table of `evaluation.json` on the screen."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

from dgm.common.formatting import number, percent
from dgm.common.metric_registry import FRACTION, find_metric, is_fraction
from dgm.report.read_run import SPREAD, is_detail

_HEADER_KEYS = ("checkpoint", "images_seen")


def unit(key: str) -> str:
    """Return the unit of a metric, or its label where it has none."""
    metric = find_metric(key)
    return metric.label if metric.unit in ("", FRACTION) else metric.unit


def format_metric(name: str, value: object) -> str:
    """Return the value of a metric as text: fractions in percent."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return percent(value) if is_fraction(name) else number(value)


def format_with_spread(name: str, found: dict[str, Any]) -> str:
    """Return a metric of `found` as text, with its standard deviation over seeds."""
    text, spreads = format_metric(name, found[name]), found.get(SPREAD, {})
    spread = spreads.get(name) if isinstance(spreads, dict) else None
    if not isinstance(spread, int | float):
        return text
    fraction = is_fraction(name)
    return f"{text} ± {100 * spread if fraction else spread:.2g}{' %' * fraction}"


def table(runs: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of a table of runs side by side; settings that all share appear once."""
    names = list(dict.fromkeys(name for found in runs.values() for name in found))
    width = max(18, *(len(name) + 2 for name in runs))
    yield _line("", list(runs), width)
    yield _line("images seen", [f"{found['images_seen']:,}" for found in runs.values()], width)
    for name in names:
        if name not in _HEADER_KEYS:
            found = [run.get(name, {}) for run in runs.values()]
            yield from ("", name.replace("_", " "), *_rows(found, width))


def _rows(found: list[dict[str, Any]], width: int) -> Iterator[str]:
    names = list(dict.fromkeys(name for measure in found for name in measure))
    names = [name for name in names if not _is_list(name, found)]
    shared = [name for name in names if _is_shared_setting(name, found)]
    first = "; ".join(f"{find_metric(name).label} {_cell(name, found[0][name])}" for name in shared)
    yield from textwrap.wrap(first, 100, initial_indent="  ", subsequent_indent="  ")
    for name in (name for name in names if name not in shared):
        metric = find_metric(name)
        parts = [value if isinstance(value := m.get(name), dict) else {} for m in found]
        if any(parts):
            yield f"  {metric.label}" + (f": {metric.protocol}" if metric.protocol else "")
            for part in dict.fromkeys(part for own in parts for part in own):
                yield _line(f"    {part}", [_cell(name, own.get(part)) for own in parts], width)
        else:
            cells = [format_with_spread(name, m) if name in m else "–" for m in found]
            yield _line(f"  {metric.label}", cells, width, metric.protocol)


def _is_list(name: str, found: list[dict[str, Any]]) -> bool:
    return name == SPREAD or any(isinstance(measure.get(name), list) for measure in found)


def _is_shared_setting(name: str, found: list[dict[str, Any]]) -> bool:
    values = [measure[name] for measure in found if name in measure]
    plain = not is_detail(name) and all(isinstance(value, int | str) for value in values)
    return plain and len({str(measure.get(name)) for measure in found}) == 1


def _cell(name: str, value: object) -> str:
    return "–" if value is None else format_metric(name, value)


def _line(first: str, cells: list[str], width: int, note: str = "") -> str:
    return (
        f"{first:40}" + "".join(f" {cell:>{width - 1}}" for cell in cells) + f"  {note}"
    ).rstrip()
