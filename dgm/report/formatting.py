"""Metrics as people read them."""

from __future__ import annotations

from dgm.common.formatting import number, percent
from dgm.metrics import is_fraction

_UNITS = {
    "images_per_s": "images/s",
    "bits_per_dim": "bits per dimension",
    "_s": "s",
    "_gib": "GiB",
}


def figure(name: str, value: object) -> str:
    """Write what was measured under a name: shares in percent."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return percent(value) if is_fraction(name) else number(value)


def unit(key: str) -> str:
    """Give the unit of a metric, or what it is where it has none."""
    last = key.split("/")[-1]
    known = next((unit for ending, unit in _UNITS.items() if ending in last), None)
    return known or {"lr": "learning rate", "grad_norm": "norm"}.get(last, last.replace("_", " "))
