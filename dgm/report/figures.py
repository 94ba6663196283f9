"""Plots written as PNG files into a run folder, drawn by matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dgm.common.atomic_io import replacing
from dgm.common.run_files import read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DENOISING_METRICS = {
    "psnr_db": "PSNR to the real image, dB",
    "ssim": "SSIM to the real image",
    "feature_distance": "distance in the classifier's features",
    "class_seen": "fraction whose class is recognized",
}
"""Metrics of `launch/denoise.py`, of noised and of denoised images, with their axis labels."""
SWEEP_METRICS = {
    "fd_classifier": "Frechet distance in the classifier's features",
    "class_consistency": "fraction whose class is recognized",
    "class_certainty": "probability of the likeliest class",
    "diversity": "distance between two images in features",
}
"""Metrics of `launch/explore.py` at each setting of a sampler, with their axis labels."""
SWEEP_TIME = "seconds_per_image"
_DENOISING_STYLES = {"denoised": ("#0072b2", "-", "o"), "noised": ("#d55e00", "--", "s")}
_SWEEP_STYLES = (("#0072b2", "o-"), ("#d55e00", "s--"), ("#009e73", "^:"), ("#b85c94", "D-."))


def save_loss_curve(folder: Path) -> Path | None:
    """Plot every loss of `metrics.jsonl` over images seen; return `loss.png`, None without any."""
    lines = read_metrics(folder / "metrics.jsonl")
    names = sorted({key for line in lines for key in line if key.split("/")[-1].startswith("loss")})
    if not names:
        return None
    figure = _new_figure(7, 4)
    axes = figure.add_subplot()
    for name in names:
        points = [(line["images_seen"], line[name]) for line in lines if name in line]
        seen, values = zip(*points, strict=True)
        axes.plot(seen, values, marker="." if len(points) < 3 else "", label=name)
    axes.set(xlabel="images seen", ylabel="loss")
    axes.set_title(folder.name, parse_math=False)  # a $ in a folder's name is not a formula
    if all(line[name] > 0 for line in lines for name in names if name in line):
        axes.set_yscale("log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    return _save(figure, folder / "loss.png")


def save_denoising_curves(
    points: Sequence[Mapping[str, float]], class_seen_real: float, path: Path
) -> None:
    """Plot each metric over the number of noising steps, of noised and of denoised images."""
    figure = _new_figure(9, 6)
    steps = [point["steps"] for point in points]
    for axes, (metric, label) in zip(
        figure.subplots(2, 2).flat, DENOISING_METRICS.items(), strict=True
    ):
        for name, (colour, line, marker) in _DENOISING_STYLES.items():
            values = [point[f"{metric}_{name}"] for point in points]
            axes.plot(steps, values, line, color=colour, marker=marker, markersize=4, label=name)
        if metric == "class_seen":
            axes.axhline(class_seen_real, color="#666666", linestyle=":", label="real")
            axes.set_ylim(0, 1.02)
        axes.set(xscale="log", xlabel="steps of noise", ylabel=label)
        axes.grid(alpha=0.3)
        axes.legend()
    _save(figure, path)


def sweep_curves(settings: Mapping[str, Any]) -> tuple[str, dict[str, list[dict[str, Any]]]]:
    """Return the x axis of the plots of a sampler sweep, and the rows of each curve by name.

    If the number of steps is swept, the axis is time; otherwise it is the innermost setting. Each
    value of an outer setting has a curve of its own.
    """
    *outer, inner = settings["varied"]
    curves: dict[str, list[dict[str, Any]]] = {}
    for row in settings["rows"]:
        name = ", ".join(f"{key} {row[key]:g}" for key in outer) or "generated"
        curves.setdefault(name, []).append(row)
    x_key = SWEEP_TIME if inner == "steps" else inner
    return x_key, {name: sorted(rows, key=lambda r: r[x_key]) for name, rows in curves.items()}


def save_sweep_plots(settings: Mapping[str, Any], path: Path) -> None:
    """Plot each metric over time or the varied setting, beside that of real images."""
    from matplotlib.ticker import LogLocator, NullFormatter

    x_key, curves = sweep_curves(settings)
    metrics = [name for name in SWEEP_METRICS if name in settings["real"]]
    figure = _new_figure(5 * len(metrics), 4)
    for axes, metric in zip(figure.subplots(1, len(metrics)), metrics, strict=True):
        for k, (name, rows) in enumerate(curves.items()):
            colour, line = _SWEEP_STYLES[k % len(_SWEEP_STYLES)]
            x, y = ([row[key] for row in rows] for key in (x_key, metric))
            axes.plot(x, y, line, color=colour, label=name)
            for row in rows if x_key == SWEEP_TIME else ():
                axes.annotate(
                    f"{row['steps']}", (row[x_key], row[metric]), xytext=(4, 4),
                    textcoords="offset points", fontsize=8, color=colour,
                )  # fmt: skip
        real = settings["real"][metric]
        axes.axhline(real, color="#666666", linestyle=":", label="real test images")
        label = "seconds per image (steps at the points)" if x_key == SWEEP_TIME else x_key
        axes.set(xlabel=label, ylabel=SWEEP_METRICS[metric])
        if x_key == SWEEP_TIME:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3, which="both")
    figure.axes[0].legend()
    _save(figure, path)


def _new_figure(width: float, height: float) -> Figure:
    # Imported here because it is slow and only plots need it; Agg draws without a screen.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        figure.savefig(partial, format="png")
    return path
