"""What the settings of a sampler do to its images, as a plot."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MEASURES = {
    "fd_classifier": "Frechet distance in the classifier's features",
    "class_consistency": "share whose class is seen",
    "class_certainty": "probability of the likeliest class",
    "diversity": "distance between two images in features",
}
TIME = "seconds_per_image"
_LOOKS = (("#0072b2", "o-"), ("#d55e00", "s--"), ("#009e73", "^:"), ("#b85c94", "D-."))


def series(settings: Mapping[str, Any]) -> tuple[str, dict[str, list[dict[str, Any]]]]:
    """Say over what quality is drawn, and the rows of each curve by name.

    Over time where steps are varied, a curve for each value of what else is; else over the value.
    """
    *outer, inner = settings["varied"]
    curves: dict[str, list[dict[str, Any]]] = {}
    for row in settings["rows"]:
        name = ", ".join(f"{key} {row[key]:g}" for key in outer) or "generated"
        curves.setdefault(name, []).append(row)
    over = TIME if inner == "steps" else inner
    return over, {name: sorted(rows, key=lambda r: r[over]) for name, rows in curves.items()}


def save_plots(settings: Mapping[str, Any], path: Path) -> None:
    """Draw each measure over time or the value that was varied, beside that of real images."""
    # Slow to import, and only drawing needs it; Agg draws without a screen.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    over, curves = series(settings)
    measures = [name for name in MEASURES if name in settings["real"]]
    figure = Figure(figsize=(5 * len(measures), 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, measure in zip(figure.subplots(1, len(measures)), measures, strict=True):
        for k, (name, rows) in enumerate(curves.items()):
            colour, line = _LOOKS[k % len(_LOOKS)]
            x, y = ([row[key] for row in rows] for key in (over, measure))
            axes.plot(x, y, line, color=colour, label=name)
            if over == TIME:
                for row in rows:
                    axes.annotate(
                        f"{row['steps']}", (row[over], row[measure]), xytext=(4, 4),
                        textcoords="offset points", fontsize=8, color=colour,
                    )  # fmt: skip
        axes.axhline(
            settings["real"][measure], color="#666666", linestyle=":", label="real test images"
        )
        label = "seconds per image (steps at the points)" if over == TIME else over
        axes.set(xlabel=label, ylabel=MEASURES[measure])
        if over == TIME:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3, which="both")
    figure.axes[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.tmp")
    figure.savefig(partial, format="png")
    os.replace(partial, path)
