"""The page of an exercise: what was asked and expected, what came out, and the runs it rests on."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from dgm.report.denoising import show_denoised
from dgm.report.markup import Html, element, join
from dgm.report.numbers import images
from dgm.report.outcome import (
    CLOSE,
    SURE,
    Expectation,
    Groups,
    Value,
    higher_wins,
    judge,
    measure_group,
    name_of,
    rank,
    why_best,
)
from dgm.report.page import side_by_side, whole_page
from dgm.report.pictures import show_generated, show_kind, show_samples
from dgm.report.read import Run
from dgm.report.tables import listing

PICTURES = ("samples", "generated", "reconstructions", "denoised")
"""What of each run can be shown."""
_NOTHING = "–"
_GRIDS = 3  # of samples through training


@dataclass(frozen=True)
class Exercise:
    """What is asked, and how the answer is shown."""

    title: str
    asks: str
    expectations: Sequence[Expectation] = ()
    compare: Sequence[str] = ()  # measures of groups
    rank_by: Sequence[str] = ()  # measures by which the best is named
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
        rows.append([expected.says, name_of(expected.measure), told, verdict])
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
    found = {
        name: [measure_group(runs, measure) for measure in exercise.compare]
        for name, runs in groups.items()
    }
    columns = list(zip(*found.values(), strict=True))
    best = [_best(list(c), m) for c, m in zip(columns, exercise.compare, strict=True)]
    heads = [element("th", name_of(m), scope="col", class_="number") for m in exercise.compare]
    rows = [
        element(
            "tr",
            element("th", name, scope="row"),
            element("td", len(groups[name]), class_="number"),
            *(
                element(
                    "td", _NOTHING if value is None else value.text(measure),
                    class_="number best" if row in best[k] else "number",
                )
                for k, (value, measure) in enumerate(zip(values, exercise.compare, strict=True))
            ),
        )
        for row, (name, values) in enumerate(found.items())
    ]  # fmt: skip
    caption = (
        "Means over runs that differ in their seed, ± their standard deviation; of one run, that "
        "over seeds of its images. The best of a column is shaded."
    )
    head = element("tr", element("th", "", scope="col"), element("th", "runs", scope="col"), *heads)
    table = element(
        "table", element("caption", caption), element("thead", head), element("tbody", *rows)
    )
    ranking = rank(groups, exercise.rank_by) if exercise.rank_by else None
    said = [] if ranking is None else why_best(ranking, groups, exercise.rank_by)
    return join(
        element("h2", "Compared"),
        element("div", table, class_="scroll"),
        element("ul", *(element("li", sentence) for sentence in said)) if said else None,
    )


def _best(values: list[Value | None], measure: str) -> set[int]:
    higher = higher_wins(measure)
    known = [value.mean for value in values if value is not None]
    if higher is None or len(set(known)) < 2:
        return set()
    best = max(known) if higher else min(known)
    return {row for row, value in enumerate(values) if value is not None and value.mean == best}


def _least(runs: list[Run]) -> Html:
    rows: list[list[object]] = []
    for run in runs:
        for key in (k for k in run.keys if k.startswith("train/") and "loss" in k.split("/")[-1]):
            curve = run.curve(key)
            least, where = curve.least()
            rows.append([run.name, key, least, images(where), curve.values[-1]])
    heads = ["run", "loss", "least", "after", "last"]
    return join(element("h2", "The least of each loss"), listing("From the logs", heads, rows))


def _pictures(kind: str, groups: Groups) -> Html | None:
    """Show pictures of one kind, of the first run of each group."""
    parts = []
    for name, runs in groups.items():
        run = runs[0]
        ways = {
            "samples": lambda run: show_samples(run.folder, run.name, _GRIDS),
            "generated": lambda run: show_generated(run.folder, run.name),
            "denoised": lambda run: show_denoised(run.folder, run.name),
        }
        shown = ways.get(kind, lambda run: show_kind(run.folder, kind, run.name))(run)
        if shown is not None:
            parts += [element("h3", name), shown]
    titles = {
        "samples": "Samples through training",
        "generated": "One image of each class",
        "reconstructions": "Images and their reconstructions",
        "denoised": "Real images, noised a part of the way and denoised",
    }
    return join(element("h2", titles[kind]), *parts) if parts else None
