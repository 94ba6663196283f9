"""Human-readable numbers, durations and sizes."""

from __future__ import annotations

import math


def number(value: float) -> str:
    """Return an integer with separators, any other number with four significant digits."""
    if isinstance(value, int) or (abs(value) >= 1000 and abs(value) < 1e15):
        return f"{value:,.0f}"
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    return f"{value:.4g}" if abs(value) >= 1e-4 else _tiny(value)


def percent(fraction: float) -> str:
    """Return a fraction in percent."""
    return f"{100 * fraction:.3g} %" if fraction < 0.1 else f"{100 * fraction:.1f} %"


def _tiny(value: float) -> str:
    """Return 1.04e-5, where Python writes 1.040e-05."""
    digits, power = f"{value:.3e}".split("e")
    return f"{float(digits):g}e{int(power)}"


def counted(count: float, thing: str) -> str:
    """Return a count with its noun: `1 tar`, `50,000 images`."""
    return f"{count:,.0f} {thing}{'' if count == 1 else 's'}"


def duration(seconds: float) -> str:
    """Return a time in its two largest units: `41.2 s`, `12 min 03 s`, `1 h 20 min`, `3 d 4 h`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02} min"
    return f"{hours // 24} d {hours % 24} h"


def size_of(count: int) -> str:
    """Return a number of bytes: `154 MB`."""
    value = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:,.3g} TB"
