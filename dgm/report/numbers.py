"""Numbers as people read them."""

from __future__ import annotations

import math

from dgm.metrics import is_fraction

_UNITS = {
    "images_per_s": "images/s",
    "bits_per_dim": "bits per dimension",
    "_s": "s",
    "_gib": "GiB",
}


def number(value: float) -> str:
    """Write a count whole, any other figure with four digits."""
    if isinstance(value, int) or (abs(value) >= 1000 and abs(value) < 1e15):
        return f"{value:,.0f}"
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    return f"{value:.4g}" if abs(value) >= 1e-4 else _tiny(value)


def percent(share: float) -> str:
    """Write a share in percent."""
    return f"{100 * share:.3g} %" if share < 0.1 else f"{100 * share:.1f} %"


def short(value: float) -> str:
    """Write a number for the edge of a chart: 1,500,000 as 1.5M."""
    for size, ending in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{ending}"
    if value == 0:
        return "0"
    return f"{value:.4g}" if abs(value) >= 1e-3 else _tiny(value)


def _tiny(value: float) -> str:
    """Write 1.04e-5, where Python writes 1.040e-05."""
    digits, power = f"{value:.3e}".split("e")
    return f"{float(digits):g}e{int(power)}"


def images(count: float) -> str:
    """Write how many images were seen."""
    return f"{count:,.0f} images"


def duration(seconds: float) -> str:
    """Write a time in the two units that matter."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02} min"
    return f"{hours // 24} d {hours % 24} h"


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
