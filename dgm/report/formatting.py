"""Metrics as people read them."""

from __future__ import annotations

from dgm.common.formatting import number, percent
from dgm.common.metric_registry import FRACTION, find_metric, is_fraction


def figure(name: str, value: object) -> str:
    """Write what was measured under a name: shares in percent."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return percent(value) if is_fraction(name) else number(value)


def unit(key: str) -> str:
    """Return the unit of a metric, or its label where it has none."""
    metric = find_metric(key)
    return metric.label if metric.unit in ("", FRACTION) else metric.unit
