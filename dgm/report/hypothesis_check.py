"""Metrics named in an exercise's file, compared between groups of runs that differ in their seed.

NAME/PART               of evaluation.json, as distances_classifier/fd_classifier
bits per dimension      exact for dequantized data (a flow), else a bound, else that by the ODE
final KEY, min KEY      of a metric of metrics.jsonl
min after KEY           the fraction of the run at which its minimum was reached
denoised STEPS/NAME     of denoised/denoising.json
wall time, images/s
spread of METRIC        over the runs of a group: standard deviation as a fraction of the mean
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any, Literal

from dgm.common.formatting import duration, number, percent
from dgm.common.metric_registry import find_metric, higher_is_better, is_fraction
from dgm.report.evaluation_table import format_metric
from dgm.report.read_run import SPREAD, Curve, Run
from dgm.report.studies import denoising_label, denoising_metric

Groups = Mapping[str, Sequence[Run]]
Outcome = Literal["held", "did not hold", "too close to tell", "not measured"]

NUM_STANDARD_ERRORS = 2.0
"""Differences of up to this many standard errors are too close to tell."""
RELATIVE_TOLERANCE = 0.01
"""Relative differences up to this are too close to tell where no standard error is known."""
_BITS = ("bits_per_dim/exact", "bits_per_dim/bound", "bits_per_dim_ode/bound")
_SPREAD_OF = "spread of "
_OF_CURVES: dict[str, Callable[[Curve, Run], float]] = {
    "final": lambda curve, run: curve.values[-1],
    "min": lambda curve, run: curve.best()[0],
    "min after": lambda curve, run: curve.best()[1] / run.images_seen,
}


@dataclass(frozen=True)
class RunMetric:
    """A number that each run has, or each group of runs."""

    key: str  # as in the file
    name: str  # as displayed
    read: Callable[[Run], float | None]  # None where a run lacks it
    higher_is_better: bool | None  # None: neither direction is better
    unit: Literal["fraction", "seconds", "number"] = "number"
    is_spread: bool = False  # whether it is the spread of `read` over a group's runs

    def format(self, mean: float, spread: float | None = None) -> str:
        """Return a value as text, with its standard deviation if there is one."""
        if self.unit == "number":
            return format_metric(self.key, mean) + (f" ± {spread:.2g}" if spread else "")
        as_text = percent if self.unit == "fraction" else duration
        return as_text(mean) + (f" ± {as_text(spread)}" if spread else "")


@dataclass(frozen=True)
class Hypothesis:
    """An expectation stated before any run: a group's metric is below or above a baseline."""

    text: str
    metric: RunMetric
    lower: bool
    group: str
    baseline: str | float  # a group, or a number


@dataclass(frozen=True)
class Value:
    """A metric of a group: the mean over its runs, and its uncertainty."""

    mean: float
    spread: float | None = None  # standard deviation over runs, or over seeds of images of one run
    error: float | None = None  # standard error of the mean; None where it is not known

    def is_close_to(self, other: Value) -> bool:
        """Return whether the difference from another value may be chance."""
        errors = [error for error in (self.error, other.error) if error is not None]
        difference = abs(self.mean - other.mean)
        if not errors:
            return difference <= RELATIVE_TOLERANCE * max(abs(self.mean), abs(other.mean))
        return difference <= NUM_STANDARD_ERRORS * math.hypot(*errors)


def parse_metric(text: str) -> RunMetric:
    """Return the metric that a text names; raise ValueError if it names none."""
    if text.startswith(_SPREAD_OF):
        of = parse_metric(text.removeprefix(_SPREAD_OF))
        name = f"spread over runs of {of.name}"
        return RunMetric(text, name, of.read, False, "fraction", is_spread=True)
    if text == "bits per dimension":
        name = f"{text} (flows: exact for dequantized data; else a bound)"
        return RunMetric(text, name, _bits, False)
    if text == "wall time":
        return RunMetric(text, text, Run.wall_s, False, "seconds")
    if text == "images/s":
        return RunMetric(text, text, lambda run: run.median("time/images_per_s"), True)
    how, _, key = text.rpartition(" ")
    first, _, last = key.partition("/")
    higher = higher_is_better(text)
    unit: Literal["fraction", "number"] = "fraction" if is_fraction(text) else "number"
    if first and last and how == "denoised" and first.isdigit():
        name = f"{denoising_label(last)} from {first} steps of noise"
        steps = int(first)
        return RunMetric(
            text, name, lambda r: denoising_metric(r.folder, steps, last), higher, unit
        )
    if first and last and how in _OF_CURVES:
        if how == "min after":
            higher, unit = None, "fraction"
        return RunMetric(text, text, lambda run: _of_curve(run, how, key), higher, unit)
    if first and last and not how:
        name = _name_of_result(first, last)
        return RunMetric(text, name, lambda run: run.results().get(text), higher, unit)
    raise ValueError(text)


def _bits(run: Run) -> float | None:
    results = run.results()
    return next((results[name] for name in _BITS if name in results), None)


def _of_curve(run: Run, how: str, key: str) -> float | None:
    curve = run.curve(key)
    return _OF_CURVES[how](curve, run) if curve.values else None


def _name_of_result(name: str, part: str) -> str:
    """Return a result's displayed name: FD-classifier for distances_classifier/fd_classifier."""
    text, about = find_metric(part).label, name.split("_")[0]
    alone = part in ("exact", "bound") or about in ("distances", "precision", "cost", "class")
    return text if alone or text == about else f"{about}: {text}"


def measure_group(runs: Sequence[Run], metric: RunMetric) -> Value | None:
    """Return a metric of a group; None if a run of it lacks the metric."""
    known = [value for run in runs if (value := metric.read(run)) is not None]
    if not known or len(known) < len(runs):
        return None
    mean = fmean(known)
    if metric.is_spread:
        return Value(stdev(known) / abs(mean)) if len(known) > 1 and mean else None
    if len(known) > 1:
        spread = stdev(known)
        return Value(mean, spread, spread / math.sqrt(len(known)))
    return Value(mean, *_over_seeds(runs[0], metric.key))


def _over_seeds(run: Run, key: str) -> tuple[float | None, float | None]:
    """Return the spread of a metric over seeds of generated images, and the error of its mean."""
    name, _, part = key.rpartition("/")
    found: Any = run.evaluation.get(name)
    try:
        spread, seeds = float(found[SPREAD][part]), int(found["num_seeds"])
        return spread, spread / math.sqrt(seeds)
    except (TypeError, KeyError, ValueError, ZeroDivisionError):  # evaluated with a single seed
        return None, None


def check_hypothesis(hypothesis: Hypothesis, groups: Groups) -> tuple[Outcome, str]:
    """Return whether a hypothesis held, and the values that show it."""
    metric, group, baseline = hypothesis.metric, hypothesis.group, hypothesis.baseline
    one = measure_group(groups[group], metric)
    if isinstance(baseline, str):
        other = measure_group(groups[baseline], metric)
    else:
        other = Value(baseline, error=0.0)
    if one is None or other is None:
        return "not measured", f"{metric.name} is missing"
    text = f"{group} {metric.format(one.mean, one.spread)}, "
    if isinstance(baseline, str):
        text += f"{baseline} {metric.format(other.mean, other.spread)}"
        text += _ratio(one.mean, other.mean)
    else:
        text += f"the bound {metric.format(other.mean)}"
    if one.is_close_to(other):
        return "too close to tell", text
    return ("held" if (one.mean < other.mean) == hypothesis.lower else "did not hold"), text


def _ratio(one: float, other: float) -> str:
    if one <= 0 or other <= 0:
        return ""
    times = number(max(one, other) / min(one, other))
    return "" if times == "1" else f" ({times} times)"


def name_best(groups: Groups, metrics: Sequence[RunMetric]) -> list[str]:
    """Return sentences on the best group, by the sum of its ranks in several metrics.

    The first metric breaks ties. Empty where a group lacks a metric.
    """
    columns: list[dict[str, Value]] = []
    for metric in metrics:
        found = {name: measure_group(runs, metric) for name, runs in groups.items()}
        columns.append({name: value for name, value in found.items() if value is not None})
    if len(groups) < 2 or not columns or any(len(column) < len(groups) for column in columns):
        return []
    pairs = list(zip(metrics, columns, strict=True))
    ranks = {name: [_rank(name, column, m) for m, column in pairs] for name in groups}
    ordered = sorted(groups, key=lambda name: (sum(ranks[name]), ranks[name][0]))
    sums = ", ".join(f"{name} {sum(ranks[name])}" for name in ordered)
    first = f"Best is {ordered[0]}, by the sum of its ranks in {len(metrics)} metrics"
    return [f"{first} ({sums}; lowest is best).", *(_compare(ordered[0], c, m) for m, c in pairs)]


def _rank(name: str, values: Mapping[str, Value], metric: RunMetric) -> int:
    own, higher = values[name].mean, metric.higher_is_better
    return 1 + sum(v.mean > own if higher else v.mean < own for v in values.values())


def _compare(name: str, values: Mapping[str, Value], metric: RunMetric) -> str:
    """Return a sentence that compares a group with the best of the others."""
    own = values[name]
    rival_name = min((n for n in values if n != name), key=lambda n: _rank(n, values, metric))
    rival = values[rival_name]
    text = (
        f"{metric.format(own.mean, own.spread)} against "
        f"{metric.format(rival.mean, rival.spread)} of {rival_name}"
    )
    if own.mean == rival.mean:
        return f"In {metric.name} it equals {rival_name}: {text}."
    rank = _rank(name, values, metric)
    word = {1: "first", 2: "second", 3: "third"}.get(rank, f"number {rank} of all")
    chance = ", which may be chance" * own.is_close_to(rival)
    return f"In {metric.name} it is {word}: {text}{chance}."
