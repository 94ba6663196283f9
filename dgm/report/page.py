"""One HTML page on runs, whole in itself: no network, no file beside it."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence

from dgm.report.curve_summary import observe
from dgm.report.curves import NUM_STYLES, chart
from dgm.report.failures import Failure
from dgm.report.markup import Html, element, join
from dgm.report.pictures import last_of_each
from dgm.report.read_run import Run
from dgm.report.sections import parts_of, what_was_run
from dgm.report.style import CSS, JS
from dgm.report.tables import differing, listing, table_of_runs

_SMALL = ("lr", "grad_norm", "images_per_s")
_GRIDS = 5  # of samples through training, where there is one run
_SMOOTHED = (
    "Computed from metrics.jsonl. Losses of several runs are compared as means over a twentieth of "
    "their logs."
)


def make_page(title: str, runs: list[Run], failures: list[Failure]) -> str:
    """Write the page on a run, or on several side by side."""
    one = len(runs) == 1 and not failures
    return whole_page(title, _one(runs[0]) if one else side_by_side(runs, failures))


def whole_page(title: str, content: Html) -> str:
    """Make a page of its content."""
    main = element("main", element("h1", title), content)
    # Even what should slip through may load nothing and run nothing.
    policy = (
        f"default-src 'none'; img-src data:; style-src 'sha256-{_digest(CSS)}'; "
        f"script-src 'sha256-{_digest(JS)}'"
    )
    head = join(
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("style", Html(CSS)),
    )
    body = element("body", main, element("script", Html(JS)))
    page = element("html", element("head", head), body, lang="en")
    # In ASCII, it is the same page whatever encoding a file is written or read in.
    return "<!DOCTYPE html>\n" + page.text.encode("ascii", "xmlcharrefreplace").decode() + "\n"


def drawn(runs: list[Run]) -> list[Run]:
    """Choose the runs whose curves are drawn: of each family those with the lowest final loss."""

    def final(run: Run) -> tuple[bool, float]:
        values = run.curve(run.losses[0]).values if run.losses else []
        return not values, values[-1] if values else 0.0

    place: dict[str, int] = {}
    for family in dict.fromkeys(run.family for run in runs):
        own = sorted((run for run in runs if run.family == family), key=final)
        place.update({run.name: k for k, run in enumerate(own)})
    chosen = {run.name for run in sorted(runs, key=lambda run: place[run.name])[:NUM_STYLES]}
    return [run for run in runs if run.name in chosen]


def _one(run: Run) -> Html:
    return join(what_was_run(run), _observations([run]), _curves([run]), parts_of(run, _GRIDS))


def side_by_side(runs: list[Run], failures: Sequence[Failure] = (), pictures: bool = True) -> Html:
    """Show several runs: observations, settings and results, curves, last samples, each run."""
    chosen = drawn(runs)
    left = len(runs) - len(chosen)
    told = (
        f"Of {len(runs)} runs the {len(chosen)} with the lowest final loss are drawn"
        f"{' (of each family)' * (len({r.family for r in runs}) > 1)}."
    )
    sheets = last_of_each([(run.name, run.folder) for run in chosen]) if pictures else None
    return join(
        element("p", _count(runs, failures)),
        _observations(runs),
        *((element("h2", "Settings and results"), table_of_runs(runs)) if runs else ()),
        _failures(failures),
        element("p", told, class_="note") if left else None,
        _curves(chosen),
        *(() if sheets is None else (element("h2", "Last samples"), sheets)),
        *((element("h2", "Each run"), *map(_details, runs)) if runs else ()),
    )


def _count(runs: list[Run], failures: Sequence[Failure]) -> str:
    states: dict[str, int] = {}
    for run in runs:
        states[run.state] = states.get(run.state, 0) + 1
    told = ", ".join(f"{count} {state}" for state, count in states.items())
    failed = f"; {len(failures)} listed as failed or without a checkpoint" if failures else ""
    word = "run" if len(runs) == 1 else "runs"
    return f"{len(runs)} {word}" + (f": {told}" if runs else " to read") + failed + "."


def _details(run: Run) -> Html:
    summary = element("summary", f"{run.name}: {run.state}")
    return element("details", summary, what_was_run(run), parts_of(run, 0, "h3"))


def _observations(runs: list[Run]) -> Html | None:
    sentences = observe(runs)
    if not sentences:
        return None
    note = element(
        "p", _SMOOTHED if len(runs) > 1 else "Computed from metrics.jsonl.", class_="note"
    )
    own = [run.family for run in runs]
    parts = [key for key in differing(runs) if key.split(".")[0] in own and len(set(own)) == 1]
    if parts:
        sentences.append(
            f"The runs differ in {', '.join(parts)}: their losses may not measure the same."
        )
    items = [element("li", sentence) for sentence in sentences]
    return join(element("h2", "Observations"), note, element("ul", *items))


def _failures(failures: Sequence[Failure]) -> Html | None:
    if not failures:
        return None
    rows: list[list[object]] = [[f.name, f.reason, f.error or "–"] for f in failures]
    table = listing("Runs that failed or have no checkpoint", ["run", "how", "last error"], rows)
    return join(element("h2", "Failures"), table)


def _curves(runs: list[Run]) -> Html:
    silent = [run.name for run in runs if not run.lines]
    said = "Nothing was logged yet" + (f" by {', '.join(silent)}" if len(runs) > 1 else "") + "."
    parts = [element("p", said, class_="note")] if silent else []
    styled = list(enumerate(runs))
    families = list(dict.fromkeys(run.family for run in runs))
    for family in families:
        own = [(style, run) for style, run in styled if run.family == family]
        if charts := _charts(own, ("train/",), small=False, named=len(runs) > 1):
            parts += [element("h3", f"{family}: losses")] * (len(families) > 1) + [charts]
    for begins, small in ((("eval/",), False), (("train/", "time/"), True)):
        if charts := _charts(styled, begins, small, named=len(runs) > 1):
            parts.append(charts)
    return join(element("h2", "Curves"), *parts) if parts else join()


def _charts(
    styled: list[tuple[int, Run]], begins: tuple[str, ...], small: bool, named: bool
) -> Html | None:
    """Draw each metric of one kind, losses first; None where nothing is logged of it."""
    keys = dict.fromkeys(
        key
        for _, run in styled
        for key in run.keys
        if key.startswith(begins) and (key.split("/")[-1] in _SMALL) == small
    )
    order = sorted(keys, key=lambda key: not key.split("/")[-1].startswith("loss"))
    charts = [
        chart(key, {run.name: (style, run.curve(key)) for style, run in styled}, small, named)
        for key in order
    ]
    return element("div", *charts, class_="charts small" if small else "charts") if charts else None


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
