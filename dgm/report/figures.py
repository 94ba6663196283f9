"""Figures drawn from a run folder."""

from __future__ import annotations

from pathlib import Path

from dgm.common.atomic_io import replacing
from dgm.common.run_files import read_metrics


def save_loss_curve(folder: Path) -> Path | None:
    """Draw every loss of `metrics.jsonl` over images seen as `loss.png`; None without any."""
    lines = read_metrics(folder / "metrics.jsonl")
    names = sorted({key for line in lines for key in line if key.split("/")[-1].startswith("loss")})
    if not names:
        return None
    # Slow to import, and only drawing needs it; Agg draws without a screen.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name in names:
        points = [(line["images_seen"], line[name]) for line in lines if name in line]
        seen, values = zip(*points, strict=True)
        axes.plot(seen, values, marker="." if len(points) < 3 else "", label=name)
    axes.set(xlabel="images seen", ylabel="loss")
    axes.set_title(folder.name, parse_math=False)  # whatever a folder is called
    if all(line[name] > 0 for line in lines for name in names if name in line):
        axes.set_yscale("log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    path = folder / "loss.png"
    with replacing(path) as partial:
        figure.savefig(partial, format="png")
    return path
