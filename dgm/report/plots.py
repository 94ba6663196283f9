"""Points as SVG: what was measured over what was varied."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

from dgm.common.formatting import number
from dgm.report.curves import (
    BOTTOM,
    LEFT,
    NUM_STYLES,
    RIGHT,
    TOP,
    Axis,
    edges,
    spread,
    swatch,
)
from dgm.report.markup import Html, element, join

_WIDTH, _HEIGHT = 520, 320
_POINT = 4  # radius
_BEYOND = 1e100  # what no axis can hold; no number at all is not below it either
_LEVEL = 4  # style of what is the same everywhere, which no other line has


@dataclass(frozen=True)
class Line:
    """Points of one kind; those that cannot be drawn are left out."""

    name: str
    points: list[tuple[float, float]]
    marks: list[str] | None = None  # a word beside each point
    level: bool = False  # one value, drawn across


def plot(title: str, over: str, lines: list[Line], log: bool = False) -> Html | None:
    """Draw lines through their points, `over` named below; None without any point.

    `log` asks for a logarithmic axis below, which only positive values get.
    """
    lines = [line for line in map(_drawable, lines) if line.points]
    points = [point for line in lines for point in line.points]
    across = [x for line in lines if not line.level for x, _ in line.points]
    if not across:
        return None
    values = [y for _, y in points]
    log = log and min(across) > 0
    x = Axis(*spread(min(across), max(across), log), LEFT, _WIDTH - RIGHT, log)
    y = Axis(*spread(min(values), max(values), False), _HEIGHT - BOTTOM, TOP)
    others = itertools.cycle(style for style in range(NUM_STYLES) if style != _LEVEL)
    styles = [_LEVEL if line.level else next(others) for line in lines]
    drawn = [_line(line, style, x, y) for line, style in zip(lines, styles, strict=True)]
    label = f"{over} (log)" if log else over
    picture = element(
        "svg", edges(x, y, _WIDTH, _HEIGHT, "", label), *drawn,
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}", role="img", aria_label=f"{title} over {over}",
    )  # fmt: skip
    legend = [
        element("li", swatch(style), line.name) for line, style in zip(lines, styles, strict=True)
    ]
    caption = element("figcaption", title)
    return element("figure", caption, picture, element("ul", *legend, class_="legend"))


def _drawable(line: Line) -> Line:
    kept = [k for k, point in enumerate(line.points) if all(abs(v) < _BEYOND for v in point)]
    marks = None if line.marks is None else [line.marks[k] for k in kept]
    return replace(line, points=[line.points[k] for k in kept], marks=marks)


def _line(line: Line, style: int, x: Axis, y: Axis) -> Html:
    if line.level:
        at = y.place(line.points[0][1])
        return element("line", x1=x.start, x2=x.end, y1=at, y2=at, class_=f"curve s{style}")
    places = [(x.place(a), y.place(b)) for a, b in line.points]
    parts = [
        element(
            "polyline", points=" ".join(f"{a},{b}" for a, b in places), class_=f"curve s{style}"
        )
    ]
    for k, (a, b) in enumerate(places):
        told = f"{line.name}: {number(line.points[k][1])} at {number(line.points[k][0])}"
        parts.append(
            element("circle", element("title", told), cx=a, cy=b, r=_POINT, class_=f"dot s{style}")
        )
        if line.marks is not None:
            parts.append(element("text", line.marks[k], x=a + 6, y=b - 6))
    return join(*parts)
