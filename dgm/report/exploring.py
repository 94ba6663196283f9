"""What was found by exploring a run: walks through latents, and settings of its sampler."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dgm.common.atomic_io import replacing
from dgm.report.markup import Html, element, join
from dgm.report.plots import Line, plot
from dgm.report.schema import (
    ForeignError,
    list_in,
    number_in,
    object_in,
    rows_in,
    show_sheets,
    show_study,
    text_in,
)
from dgm.report.tables import evaluation_tables, listing

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
    with replacing(path) as partial:
        figure.savefig(partial, format="png")


def show_explored(folder: Path, of: str) -> Html | None:
    """Show `explored/` of a run folder: sheets, figures, plots; None where there is none."""

    def show(found: dict[str, Any]) -> Html:
        sheets = [
            (text_in(sheet, "file"), text_in(sheet, "caption"))
            for sheet in list_in(found, "sheets", dict)
        ]
        settings = object_in(found, "settings")
        told = f"After {number_in(found, 'images_seen'):,} images seen."
        notes = [told, *list_in(found, "notes", str)]
        return join(
            *(element("p", note) for note in notes),
            show_sheets(folder / "explored", sheets, of),
            element("div", *_walks(found), class_="grids"),
            _settings(settings),
        )

    return show_study(folder, "explored/exploration.json", "launch/explore.py", show)


def _walks(found: dict[str, Any]) -> list[Html]:
    walk = object_in(found, "interpolation")
    names = ("mean_step", "largest_over_mean", "psnr_db_of_ends")
    shown = {n.replace("_", " "): number_in(walk, n) for n in names if n in walk}
    way = f"{text_in(walk, 'between')} along a {text_in(walk, 'along')}"
    tables = evaluation_tables(
        shown, f"Interpolation between {way}: steps in the classifier's features"
    )
    if "traversal" in found:
        traversal = object_in(found, "traversal")
        rows = rows_in(traversal, "rows")
        columns = list(rows[0]) if rows else []
        rows_in(traversal, "rows", *columns)  # each has the same numbers
        heads = [column.replace("_", " ") for column in columns]
        caption = f"Traversal: {text_in(traversal, 'moved')}"
        tables.append(listing(caption, heads, [[row[c] for c in columns] for row in rows]))
    return tables


def _settings(settings: dict[str, Any]) -> Html:
    varied, real = list_in(settings, "varied", str), object_in(settings, "real")
    measures = [name for name in MEASURES if name in real]
    columns = [*varied, *measures, TIME]
    rows = rows_in(settings, "rows", *columns)
    if not varied:
        raise ForeignError("nothing was varied")
    for measure in measures:
        number_in(real, measure)
    cells: list[list[Any]] = [[row[name] for name in columns] for row in rows]
    # The real images have no settings.
    cells.append([None] * len(varied) + [real[name] for name in measures] + [None])
    heads = [name.replace("_", " ") for name in columns]
    by = f" by {settings['sampler']}" if isinstance(settings.get("sampler"), str) else ""
    caption = (
        f"{number_in(settings, 'num_images'):g} images{by} at each setting; "
        "real test images in the last row"
    )
    over, curves = series(settings)
    charts = [
        plot(
            title,
            f"{over.replace('_', ' ')}, steps beside" if over == TIME else over,
            [
                *(
                    Line(name, [(row[over], row[measure]) for row in own], marks(own, over))
                    for name, own in curves.items()
                ),
                Line("real test images", [(1, real[measure])], level=True),
            ],
            log=over == TIME,
        )
        for measure, title in MEASURES.items()
        if measure in real
    ]
    return join(listing(caption, heads, cells), element("div", *charts, class_="charts"))


def marks(rows: list[dict[str, Any]], over: str) -> list[str] | None:
    """Give the steps to write beside points over time."""
    return [f"{row['steps']:g}" for row in rows] if over == TIME else None
