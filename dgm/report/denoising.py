"""Curves of what becomes of images that were noised a part of the way and denoised from there."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

_PANELS = {
    "psnr_db": "PSNR to the real image, dB",
    "ssim": "SSIM to the real image",
    "feature_distance": "distance in the classifier's features",
    "class_seen": "share whose class is seen",
}
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
    partial = path.with_name(f".{path.name}.tmp")
    figure.savefig(partial, format="png")
    os.replace(partial, path)
