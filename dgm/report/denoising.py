"""Curves of what becomes of images that were noised a part of the way and denoised from there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dgm.common.atomic_io import replacing
from dgm.common.formatting import percent
from dgm.report.markup import Html, element, join
from dgm.report.plots import Line, plot
from dgm.report.read_run import as_object
from dgm.report.schema import (
    ForeignError,
    number_in,
    rows_in,
    show_sheets,
    show_study,
    text_in,
)
from dgm.report.tables import listing

_PANELS = {
    "psnr_db": "PSNR to the real image, dB",
    "ssim": "SSIM to the real image",
    "feature_distance": "distance in the classifier's features",
    "class_seen": "share whose class is seen",
}
_KINDS = ("noised", "denoised")
_COLUMNS = ["steps", *(f"{measure}_{kind}" for measure in _PANELS for kind in _KINDS)]
_STYLES = {"denoised": ("#0072b2", "-", "o"), "noised": ("#d55e00", "--", "s")}


def save_curves(points: Sequence[Mapping[str, float]], class_seen_real: float, path: Path) -> None:
    """Draw each measure over the number of noising steps, of noised and denoised images."""
    # Slow to import, and only drawing needs it; Agg draws without a screen.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    steps = [point["steps"] for point in points]
    for axes, (measure, label) in zip(figure.subplots(2, 2).flat, _PANELS.items(), strict=True):
        for name, (color, line, marker) in _STYLES.items():
            values = [point[f"{measure}_{name}"] for point in points]
            axes.plot(steps, values, line, color=color, marker=marker, markersize=4, label=name)
        if measure == "class_seen":
            axes.axhline(class_seen_real, color="#666666", linestyle=":", label="real")
            axes.set_ylim(0, 1.02)
        axes.set(xscale="log", xlabel="steps of noise", ylabel=label)
        axes.grid(alpha=0.3)
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        figure.savefig(partial, format="png")


def denoised_figure(folder: Path, steps: int, name: str) -> float | None:
    """Give what `launch/denoise.py` measured after so many steps; None where it did not."""
    try:
        found = as_object(
            (folder / "denoised" / "denoising.json").read_text(errors="replace", encoding="utf-8")
        )
        rows = rows_in(found or {}, "steps", "steps", name)
    except (OSError, ForeignError):
        return None
    return next((float(row[name]) for row in rows if row["steps"] == steps), None)


def name_of_figure(name: str) -> str:
    """Write the name of what was measured of noised or denoised images as people do."""
    return name.replace("_", " ").replace("psnr db", "PSNR, dB,").replace("ssim", "SSIM")


def show_denoised(folder: Path, of: str) -> Html | None:
    """Show `denoised/` of a run folder: sheets, figures, curves; None where there is none."""

    def show(found: dict[str, Any]) -> Html:
        rows = rows_in(found, "steps", *_COLUMNS)
        curve = rows_in(found, "curve", *_COLUMNS)
        real = number_in(found, "class_seen_real")
        count, total = (number_in(found, name) for name in ("num_images", "num_timesteps"))
        told = (
            f"{count:g} test images, noised by some of the {total:g} steps of the run's schedule "
            f"and denoised from there by {text_in(found, 'sampler')}, after "
            f"{number_in(found, 'images_seen'):,} images seen. A classifier sees the class of "
            f"{percent(real)} of the real ones."
        )
        sheets = [
            (
                f"steps-{row['steps']:04g}.png",
                f"{row['steps']:g} steps of noise. Rows: real, noised, denoised, and what was "
                "changed (grey: nothing)",
            )
            for row in rows
        ]
        heads = [name_of_figure(name) for name in _COLUMNS]
        table = listing(
            "Nearness to the real images", heads, [[row[name] for name in _COLUMNS] for row in rows]
        )
        return join(
            element("p", told),
            show_sheets(folder / "denoised", sheets, of),
            table,
            _charts(curve, real),
        )

    return show_study(folder, "denoised/denoising.json", "launch/denoise.py", show)


def _charts(curve: list[dict[str, Any]], real: float) -> Html | None:
    charts = []
    for measure, title in _PANELS.items():
        lines = [
            Line(kind, [(row["steps"], row[f"{measure}_{kind}"]) for row in curve])
            for kind in reversed(_KINDS)
        ]
        if measure == "class_seen":
            lines.append(Line("real", [(1, real)], level=True))
        charts.append(plot(title, "steps of noise", lines, log=True))
    drawn = [chart for chart in charts if chart is not None]
    return element("div", *drawn, class_="charts") if drawn else None
