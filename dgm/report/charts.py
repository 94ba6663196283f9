"""Interactive charts of metrics over images seen, as Plotly figures; the page draws them."""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Any

from dgm.common.formatting import counted, number
from dgm.common.metric_registry import higher_is_better
from dgm.common.redact import without_password
from dgm.report.evaluation_table import unit
from dgm.report.read_run import Curve

# Okabe and Ito's colours, adapted so that all are visible on white and on black.
_COLOURS = ["#0072b2", "#d55e00", "#009e73", "#b85c94", "#808080", "#c98500", "#3f9fd8", "#85851f"]
_DASHES = ["solid", "9px,4px", "2px,3px", "9px,3px,2px,3px",
           "16px,4px", "5px,3px", "12px,3px,2px,3px,2px,3px", "4px,6px"]  # fmt: skip
NUM_STYLES = len(_COLOURS)
_COLUMNS = 300  # parts of a long curve, each drawn by its minimum and maximum
_SMOOTHING = (0.9, 0.99)  # weights of the moving averages to choose from
_GREY, _FAINT = "#808080", "rgba(128,128,128,0.3)"  # text and grid, on white and on black


@dataclass(frozen=True)
class Chart:
    """A metric of one or several runs."""

    title: str
    description: str  # for screen readers
    figure: dict[str, Any]  # `data` and `layout` of Plotly
    values: list[str]  # best and last value of each run, in words
    small: bool = False


@dataclass(frozen=True)
class Library:
    """Plotly's JavaScript in the form that a page embeds."""

    packed: str  # gzip, base64
    sha256: str  # of the unpacked text, base64


@lru_cache(maxsize=1)
def plotly_library() -> Library:
    """Return the JavaScript that comes with the Python package."""
    from plotly.offline import get_plotlyjs

    source = get_plotlyjs().encode()
    packed = base64.b64encode(gzip.compress(source, mtime=0)).decode()
    return Library(packed, base64.b64encode(hashlib.sha256(source).digest()).decode())


def metric_chart(
    key: str, curves: dict[str, tuple[int, Curve]], small: bool = False, named: bool = False
) -> Chart:
    """Return the chart of a metric; `curves` has each run's line style (a number) and curve.

    The best value is marked where it is known which direction is better, except in small charts.
    With `named` there is a legend of runs.
    """
    curves = {name: (style, curve) for name, (style, curve) in curves.items() if curve.values}
    every = [value for _, curve in curves.values() for value in curve.values]
    log = min(every) > 0 and max(every) > 10 * min(every)
    lines, marks, values = [], [], []
    for name, (style, curve) in curves.items():
        best = None if small else _best(key, curve)
        lines.append(_line(name, style, curve))
        if best is not None:
            marks.append(_mark(name, style, *best))
        text = f"last {number(curve.values[-1])}"
        text = text if best is None else f"{best[2]}, {text}"
        values.append(f"{name}: {text}" if named else text)
    smoothed = [_smoothings(curve) for _, curve in curves.values()]
    menus = [_smoothing_menu(smoothed)] if any(len(own[0]) > 2 for own in smoothed) else []
    menus += [_scale_menu(log)] if min(every) > 0 else []
    return Chart(
        title=key,
        description=f"{key} over images seen" + (", logarithmic" if log else ""),
        figure={
            "data": lines + marks,
            "layout": _layout(unit(key), log, small, len(curves) * named, menus),
        },
        values=values,
        small=small,
    )


def _line(name: str, style: int, curve: Curve) -> dict[str, Any]:
    """Return the trace of a curve, of a single point as a marker."""
    kept = thin(curve)
    return {
        "type": "scatter",
        "mode": "markers" if len(curve.values) == 1 else "lines",
        "name": _text(name),
        "legendgroup": str(style),
        "x": [curve.seen[k] for k in kept],
        "y": [_rounded(curve.values[k]) for k in kept],
        "line": {"color": _COLOURS[style], "dash": _DASHES[style], "width": 2},
        "marker": {"color": _COLOURS[style], "size": 9},
    }


def _mark(name: str, style: int, value: float, seen: float, text: str) -> dict[str, Any]:
    point = _line(name, style, Curve([seen], [value]))
    return {**point, "showlegend": False, "hovertemplate": f"{text}<extra></extra>"}


def _best(key: str, curve: Curve) -> tuple[float, float, str] | None:
    """Return the best value, its images seen, both in words; None if no direction is better."""
    higher = higher_is_better(key)
    if higher is None:
        return None
    value, seen = curve.best(higher)
    word = "max" if higher else "min"
    return value, seen, f"{word} {number(value)} after {counted(seen, 'image')}"


def thin(curve: Curve) -> list[int]:
    """Return the indices to draw so that a curve looks the same; its extremes are among them."""
    values, count = curve.values, len(curve.values)
    if count <= 2 * _COLUMNS:
        return list(range(count))
    kept = {0, count - 1}
    for _, group in groupby(range(count), lambda k: k * _COLUMNS // count):
        column = list(group)
        kept |= {min(column, key=values.__getitem__), max(column, key=values.__getitem__)}
    return sorted(kept)


def moving_average(values: list[float], weight: float) -> list[float]:
    """Return the exponential moving average without its bias towards 0, as TensorBoard does."""
    averages, total, norm = [], 0.0, 0.0
    for value in values:
        total = weight * total + (1 - weight) * value
        norm = weight * norm + (1 - weight)
        averages.append(total / norm)
    return averages


def _smoothings(curve: Curve) -> list[list[float]]:
    kept = thin(curve)
    series = [curve.values, *(moving_average(curve.values, weight) for weight in _SMOOTHING)]
    return [[_rounded(values[k]) for k in kept] for values in series]


def _smoothing_menu(smoothed: list[list[list[float]]]) -> dict[str, Any]:
    """Return buttons that replace the lines, which are the first traces, by smoothed ones."""
    labels = ["as logged", *(f"EMA {weight:g}" for weight in _SMOOTHING)]
    lines = list(range(len(smoothed)))
    buttons = [
        {"label": label, "method": "restyle", "args": [{"y": [own[k] for own in smoothed]}, lines]}
        for k, label in enumerate(labels)
    ]
    return _menu(buttons, 0, x=1, xanchor="right")


def _scale_menu(log: bool) -> dict[str, Any]:
    buttons = [
        {"label": scale, "method": "relayout",
         "args": [{"yaxis.type": scale, "yaxis.autorange": True}]}
        for scale in ("linear", "log")
    ]  # fmt: skip
    return _menu(buttons, int(log), x=0, xanchor="left")


def _menu(buttons: list[dict[str, Any]], active: int, **place: Any) -> dict[str, Any]:
    return {
        "type": "dropdown", "buttons": buttons, "active": active, "direction": "down", **place,
        "y": 1.02, "yanchor": "bottom", "pad": {"t": 0, "b": 0, "l": 0, "r": 0},
        "font": {"size": 11, "color": "#333333"}, "bgcolor": "#eeeeee", "bordercolor": _FAINT,
    }  # fmt: skip


def _layout(
    label: str, log: bool, small: bool, num_named: int, menus: list[dict[str, Any]]
) -> dict[str, Any]:
    axis = {"gridcolor": _FAINT, "linecolor": _GREY, "zeroline": False, "automargin": True}
    return {
        "height": (270 if small else 370) + 12 * num_named,
        "margin": {"l": 50, "r": 8, "t": 60, "b": 40},  # Plotly's tools are above the menus
        "font": {"color": _GREY, "size": 12, "family": "system-ui, sans-serif"},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "hovermode": "x unified" if num_named else "closest",
        "hoverlabel": {"bgcolor": "#222222", "font": {"color": "#f0f0f0"}},
        "showlegend": num_named > 0,
        "legend": {"orientation": "h", "y": -0.45 if small else -0.25},
        "xaxis": {**axis, "title": {"text": "images seen"}, "hoverformat": ",d",
                  "rangemode": "tozero"},
        "yaxis": {**axis, "title": {"text": _text(label)}, "hoverformat": ".5g",
                  "type": "log" if log else "linear"},
        "updatemenus": menus,
    }  # fmt: skip


def _text(text: str) -> str:
    """Return a text without passwords, escaped, because Plotly interprets some HTML tags."""
    return html.escape(without_password(text), quote=False)


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
