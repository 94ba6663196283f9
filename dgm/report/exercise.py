"""The page of an exercise: what was asked and expected, what came out, and the runs it rests on."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dgm.common.formatting import counted
from dgm.report.denoising import show_denoised
from dgm.report.figure_names import Measure
from dgm.report.hypothesis_check import (
    CLOSE,
    SURE,
    Expectation,
    Groups,
    judge,
    measure_group,
    name_best,
)
from dgm.report.markup import Html, element, join
from dgm.report.page import side_by_side, whole_page
from dgm.report.pictures import show_generated, show_kind, show_samples
from dgm.report.read_run import Run
from dgm.report.tables import Column, listing, sortable

_NOTHING = "–"
_GRIDS = 3  # of samples through training
PICTURES: dict[str, tuple[str, Callable[[Run], Html | None]]] = {
    "samples": (
        "Samples through training", lambda run: show_samples(run.folder, run.name, _GRIDS),
    ),
    "generated": (
        "One image of each class", lambda run: show_generated(run.folder, run.name),
    ),
    "reconstructions": (
        "Images and their reconstructions",
        lambda run: show_kind(run.folder, "reconstructions", run.name),
    ),
    "denoised": (
        "Real images, noised a part of the way and denoised",
        lambda run: show_denoised(run.folder, run.name),
    ),
}  # fmt: skip
"""What of each run can be shown: a title, and how."""


@dataclass(frozen=True)
class Exercise:
    """What is asked, and how the answer is shown."""

    title: str
    asks: str
    expectations: Sequence[Expectation] = ()
    compare: Sequence[Measure] = ()  # of groups
    rank_by: Sequence[Measure] = ()  # by which the best is named
    least: bool = False  # of every loss
    show: Sequence[str] = ()


def exercise_page(exercise: Exercise, groups: Groups, command: Sequence[str]) -> str:
    """Write the page on groups of runs; `command` is what made it."""
    runs = [run for own in groups.values() for run in own]
    content = join(
        element("p", exercise.asks),
        _expected(exercise, groups),
        _compared(exercise, groups),
        _least(runs) if exercise.least else None,
        *(_pictures(kind, groups) for kind in exercise.show),
        side_by_side(runs, pictures=False),
        element("h2", "Do it again"),
        element("pre", element("code", shlex.join(command))),
    )
    return whole_page(exercise.title, content)


def _expected(exercise: Exercise, groups: Groups) -> Html | None:
    if not exercise.expectations:
        return None
    rows: list[list[object]] = []
    for expected in exercise.expectations:
        verdict, told = judge(expected, groups)
        rows.append([expected.says, expected.measure.name, told, verdict])
    heads = ["expected", "by", "what came out", "it"]
    note = (
        "What was expected stands in the exercise's file; what came out is computed. Too close to "
        f"tell is what lies within {SURE:g} standard errors over seeds, without seeds within "
        f"{100 * CLOSE:g} %."
    )
    return join(
        element("h2", "Expected beforehand, and what came out"),
        element("p", note, class_="note"),
        listing("Expectations", heads, rows),
    )


def _compared(exercise: Exercise, groups: Groups) -> Html | None:
    if not exercise.compare:
        return None
    names, counts = list(groups), [len(runs) for runs in groups.values()]
    columns = [Column("", names, names), Column("runs", counts, [str(n) for n in counts])]
    for measure in exercise.compare:
        found = [measure_group(runs, measure) for runs in groups.values()]
        columns.append(
            Column(
                measure.name,
                [None if value is None else value.mean for value in found],
                [_NOTHING if v is None else measure.write(v.mean, v.spread) for v in found],
                measure.higher,
            )
        )
    caption = (
        "Means over runs that differ in their seed, ± their standard deviation; of one run, that "
        "over seeds of its images. The best of a column is shaded."
    )
    said = [element("li", sentence) for sentence in name_best(groups, exercise.rank_by)]
    return join(
        element("h2", "Compared"),
        sortable(caption, columns),
        element("ul", *said) if said else None,
    )


def _least(runs: list[Run]) -> Html:
    rows: list[list[object]] = []
    for run in runs:
        for key in (k for k in run.keys if k.startswith("train/") and "loss" in k.split("/")[-1]):
            curve = run.curve(key)
            least, where = curve.least()
            rows.append([run.name, key, least, counted(where, "image"), curve.values[-1]])
    heads = ["run", "loss", "least", "after", "last"]
    return join(element("h2", "The least of each loss"), listing("From the logs", heads, rows))


def _pictures(kind: str, groups: Groups) -> Html | None:
    """Show pictures of one kind, of the first run of each group."""
    title, show = PICTURES[kind]
    parts = []
    for name, (run, *_) in groups.items():
        if (shown := show(run)) is not None:
            parts += [element("h3", name), shown]
    return join(element("h2", title), *parts) if parts else None
