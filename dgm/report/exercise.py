"""The page of an exercise: question, hypotheses, outcomes, and the runs they are based on."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dgm.common.formatting import counted
from dgm.report.hypothesis_check import (
    NUM_STANDARD_ERRORS,
    RELATIVE_TOLERANCE,
    Groups,
    Hypothesis,
    RunMetric,
    check_hypothesis,
    measure_group,
    name_best,
)
from dgm.report.page import compare_runs, render
from dgm.report.pictures import Picture, generated_grids, newest_grid, sample_grids
from dgm.report.read_run import Run
from dgm.report.studies import Study, denoising_study
from dgm.report.tables import NOTHING, Column, Table, column, listing, sortable

_NUM_GRIDS = 3  # sample grids through training
PICTURES: dict[str, tuple[str, Callable[[Run], list[Picture] | Study | None]]] = {
    "samples": ("Samples through training", lambda run: sample_grids(run, _NUM_GRIDS)),
    "generated": ("One image of each class", generated_grids),
    "reconstructions": (
        "Images and their reconstructions", lambda run: newest_grid(run, "reconstructions"),
    ),
    "denoised": ("Real images, partly noised and denoised", denoising_study),
}  # fmt: skip
"""Values of `show`: a title, and the content for the first run of each group."""


@dataclass(frozen=True)
class Exercise:
    """A question that runs answer, and the content of its page."""

    title: str
    question: str
    hypotheses: Sequence[Hypothesis] = ()
    compare: Sequence[RunMetric] = ()  # compared between groups
    rank_by: Sequence[RunMetric] = ()  # metrics that decide which group is best
    min_losses: bool = False  # whether to list the minimum of each loss
    show: Sequence[str] = ()


def exercise_page(exercise: Exercise, groups: Groups, command: Sequence[str]) -> str:
    """Return the page on groups of runs; `command` reproduces it."""
    runs = [run for group in groups.values() for run in group]
    compared = compare_runs(runs, pictures=False)
    return render(
        "exercise.html.j2",
        exercise.title,
        compared["curves"],
        question=exercise.question,
        hypotheses=_hypothesis_table(exercise, groups) if exercise.hypotheses else None,
        num_standard_errors=f"{NUM_STANDARD_ERRORS:g}",
        tolerance=f"{100 * RELATIVE_TOLERANCE:g} %",
        comparison=_comparison_table(exercise, groups) if exercise.compare else None,
        best=name_best(groups, exercise.rank_by),
        minima=_minima(runs) if exercise.min_losses else None,
        shown=[(PICTURES[kind][0], _first_of_each(kind, groups)) for kind in exercise.show],
        compared=compared,
        command=shlex.join(command),
    )


def _hypothesis_table(exercise: Exercise, groups: Groups) -> Table:
    rows: list[list[Any]] = []
    for hypothesis in exercise.hypotheses:
        outcome, values = check_hypothesis(hypothesis, groups)
        rows.append([hypothesis.text, hypothesis.metric.name, values, outcome])
    return listing("Hypotheses", ["hypothesis", "metric", "values", "outcome"], rows)


def _comparison_table(exercise: Exercise, groups: Groups) -> Table:
    names, counts = list(groups), [len(runs) for runs in groups.values()]
    columns = [column("", names, str), column("runs", counts, str)]
    for metric in exercise.compare:
        found = [measure_group(runs, metric) for runs in groups.values()]
        columns.append(
            Column(
                metric.name,
                [None if value is None else value.mean for value in found],
                [NOTHING if v is None else metric.format(v.mean, v.spread) for v in found],
                metric.higher_is_better,
            )
        )
    caption = (
        "Means over runs that differ in their seed, ± standard deviation; for a single run, ± the "
        "deviation over the seeds of its images. The best of a column is shaded."
    )
    return sortable(caption, columns)


def _minima(runs: list[Run]) -> Table:
    rows: list[list[Any]] = []
    for run in runs:
        for key in (k for k in run.keys if k.startswith("train/") and "loss" in k.split("/")[-1]):
            curve = run.curve(key)
            lowest, seen = curve.best()
            rows.append([run.name, key, lowest, counted(seen, "image"), curve.values[-1]])
    return listing("From the logs", ["run", "loss", "min", "after", "last"], rows)


def _first_of_each(kind: str, groups: Groups) -> list[tuple[str, Study]]:
    """Return the content for the first run of each group, without empty ones."""
    found = []
    for name, (run, *_) in groups.items():
        shown = PICTURES[kind][1](run)
        if shown:
            found.append((name, shown if isinstance(shown, Study) else Study(pictures=shown)))
    return found
