"""Curves as SVG: one metric of one or more runs over images seen."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import groupby

from dgm.common.formatting import counted, number, short
from dgm.common.metric_registry import higher_is_better
from dgm.report.formatting import unit
from dgm.report.markup import Html, element, join
from dgm.report.read_run import Curve

NUM_STYLES = 8  # colours and dash patterns of style.py
_COLUMNS = 300  # into which a long curve is thinned, each with its least and its greatest value
LEFT, RIGHT, TOP, BOTTOM = 76, 14, 12, 44


@dataclass(frozen=True)
class Axis:
    """A stretch of numbers laid along a stretch of the page."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def place(self, value: float) -> float:
        """Say where a number lies on the page."""
        low, high, value = (
            (math.log(self.low), math.log(self.high), math.log(value))
            if self.log
            else (self.low, self.high, value)
        )
        share = 0.5 if high == low else (value - low) / (high - low)
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self) -> list[float]:
        """Choose round numbers along it."""
        return _log_ticks(self.low, self.high) if self.log else _ticks(self.low, self.high)


def chart(
    key: str, curves: dict[str, tuple[int, Curve]], small: bool = False, named: bool = False
) -> Html:
    """Draw a metric of each run, given with the number of its style, as a figure.

    The best value is marked with a dot and stated where it is known which way is better, but for
    small ones.
    With `named` the legend says which run is which.
    """
    width, height = (360, 210) if small else (520, 320)
    curves = {name: (style, curve) for name, (style, curve) in curves.items() if curve.values}
    values = [value for _, curve in curves.values() for value in curve.values]
    seen = [s for _, curve in curves.values() for s in curve.seen]
    log = min(values) > 0 and 10 < max(values) / min(values) < math.inf
    x = Axis(min(0, *seen), max(seen), LEFT, width - RIGHT)
    y = Axis(*spread(min(values), max(values), log), height - BOTTOM, TOP, log)
    drawn = [_line(key, style, curve, x, y, not small) for style, curve in curves.values()]
    title = f"{key} over images seen" + (", logarithmic" if log else "")
    picture = element(
        "svg", edges(x, y, width, height, unit(key) + (" (log)" if log else "")), *drawn,
        viewBox=f"0 0 {width} {height}", role="img", aria_label=title,
    )  # fmt: skip
    legend = [_legend(key, name, *shown, small, named) for name, shown in curves.items()]
    return element(
        "figure", element("figcaption", key), picture, element("ul", *legend, class_="legend"),
        class_="small" if small else None,
    )  # fmt: skip


def _legend(key: str, name: str, style: int, curve: Curve, small: bool, named: bool) -> Html:
    last = f"last {number(curve.values[-1])}"
    best = None if small else _best(key, curve)
    said = last if best is None else f"{best[2]}, {last}"
    return element("li", *((swatch(style), f"{name}: ") if named else ()), said)


def swatch(style: int) -> Html:
    """Draw a piece of a line, for a legend."""
    return element(
        "svg", element("line", x1=0, y1=6, x2=34, y2=6, class_=f"curve s{style}"),
        viewBox="0 0 34 12", class_="swatch", aria_hidden="true",
    )  # fmt: skip


def _line(key: str, style: int, curve: Curve, x: Axis, y: Axis, marked: bool) -> Html:
    points = " ".join(f"{x.place(s)},{y.place(v)}" for s, v in thin(curve))
    alone = len(curve.values) == 1
    parts = [] if alone else [element("polyline", points=points, class_=f"curve s{style}")]
    best = _best(key, curve) if marked else None
    if best is None and alone:
        best = curve.values[0], curve.seen[0], number(curve.values[0])
    if best is not None:
        at = {"cx": x.place(best[1]), "cy": y.place(best[0])}
        dot = element("circle", element("title", best[2]), **at, r=4.5, class_=f"dot s{style}")
        parts.append(dot)
    return join(*parts)


def _best(key: str, curve: Curve) -> tuple[float, float, str] | None:
    """Give the value to mark, the images seen there, and both in words."""
    higher = higher_is_better(key)
    if higher is None:
        return None
    value, where = curve.greatest() if higher else curve.least()
    return (
        value,
        where,
        f"{'greatest' if higher else 'least'} {number(value)} after {counted(where, 'image')}",
    )


def thin(curve: Curve) -> list[tuple[float, float]]:
    """Leave so many points that a curve looks the same; its least and greatest stay."""
    points = list(zip(curve.seen, curve.values, strict=True))
    if len(points) <= 2 * _COLUMNS:
        return points
    kept = [points[0]]
    for _, group in groupby(enumerate(points), lambda p: p[0] * _COLUMNS // len(points)):
        column = list(group)
        ends = {min(column, key=lambda p: p[1][1]), max(column, key=lambda p: p[1][1])}
        kept += [point for _, point in sorted(ends)]
    return [*kept, points[-1]]


def edges(
    x: Axis, y: Axis, width: int, height: int, label: str, below: str = "images seen"
) -> Html:
    """Draw the lines and numbers of both axes, each with its label."""
    parts = []
    for value in y.ticks():
        at = y.place(value)
        parts.append(element("line", x1=x.start, x2=x.end, y1=at, y2=at, class_="grid"))
        parts.append(element("text", short(value), x=x.start - 6, y=at + 4, text_anchor="end"))
    for value in x.ticks():
        at = x.place(value)
        parts.append(element("line", x1=at, x2=at, y1=y.start, y2=y.start + 5, class_="tick"))
        parts.append(element("text", short(value), x=at, y=y.start + 18, text_anchor="middle"))
    middle = (y.start + y.end) / 2
    return join(
        *parts,
        element("line", x1=x.start, x2=x.end, y1=y.start, y2=y.start, class_="tick"),
        element(
            "text", below, x=(x.start + x.end) / 2, y=height - 6, text_anchor="middle"
        ),
        element(
            "text", label, x=14, y=middle, text_anchor="middle",
            transform=f"rotate(-90 14 {middle})",
        ),
    )  # fmt: skip


def spread(low: float, high: float, log: bool) -> tuple[float, float]:
    """Leave some room below and above."""
    if log:
        room = 10 ** (0.04 * (math.log10(high) - math.log10(low)))
        return low / room, high * room
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room


def _ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    if high <= low:
        return [low]
    size = 10 ** math.floor(math.log10((high - low) / wanted))
    step = next(size * k for k in (1, 2, 5, 10) if size * k * wanted >= high - low)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    # Not 0.30000000000000004.
    return [float(f"{k * step:.12g}") for k in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    several = math.log10(high) - math.log10(low) > 3
    factors = (1,) if several else (1, 2, 5)
    every = -(-len(decades) // 7) if several else 1
    found = [factor * 10.0**k for k in decades[::every] for factor in factors]
    return [value for value in found if low <= value <= high]
