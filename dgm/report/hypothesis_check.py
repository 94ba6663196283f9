"""What came out of runs that were to answer a question: groups compared, expectations met or not.

A group holds runs that differ in their seed only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any, Literal

from dgm.common.formatting import number
from dgm.report.figure_names import Measure
from dgm.report.read_run import SPREAD, Run

Groups = Mapping[str, Sequence[Run]]
Verdict = Literal["held", "did not hold", "too close to tell", "not measured"]

SURE = 2.0
"""Standard errors of a difference within which it may be chance."""
CLOSE = 0.01
"""Share within which it may be chance where no seeds tell how far figures scatter."""


@dataclass(frozen=True)
class Expectation:
    """What was expected before anything ran: a measure of one group below or above another's.

    `than` is a group, or a number.
    """

    says: str
    measure: Measure
    lower: bool
    of: str
    than: str | float


@dataclass(frozen=True)
class Value:
    """A measure of a group: the mean over its runs, and how far that may be off by chance."""

    mean: float
    spread: float | None = None  # standard deviation over runs, or over seeds of images of one run
    error: float | None = None  # standard error of the mean; None where nothing tells

    def may_be(self, other: Value) -> bool:
        """Say whether the difference from another value may be chance."""
        errors = [error for error in (self.error, other.error) if error is not None]
        difference = abs(self.mean - other.mean)
        if not errors:
            return difference <= CLOSE * max(abs(self.mean), abs(other.mean))
        return difference <= SURE * math.hypot(*errors)


def measure_group(runs: Sequence[Run], measure: Measure) -> Value | None:
    """Give a measure of a group; None where a run of it has none."""
    known = [value for run in runs if (value := measure.of(run)) is not None]
    if not known or len(known) < len(runs):
        return None
    mean = fmean(known)
    if measure.spread_of is not None:
        return Value(stdev(known) / abs(mean)) if len(known) > 1 and mean else None
    if len(known) > 1:
        spread = stdev(known)
        return Value(mean, spread, spread / math.sqrt(len(known)))
    return Value(mean, *_over_seeds(runs[0], measure.key))


def _over_seeds(run: Run, key: str) -> tuple[float | None, float | None]:
    """Give the scatter of a figure over seeds of generated images, and the error of its mean."""
    name, _, part = key.rpartition("/")
    found: Any = run.evaluation.get(name)
    try:
        spread, seeds = float(found[SPREAD][part]), int(found["num_seeds"])
        return spread, spread / math.sqrt(seeds)
    except (TypeError, KeyError, ValueError, ZeroDivisionError):  # it was not taken over seeds
        return None, None


def judge(expected: Expectation, groups: Groups) -> tuple[Verdict, str]:
    """Say whether an expectation held, and by which figures."""
    measure = expected.measure
    one = measure_group(groups[expected.of], measure)
    if isinstance(expected.than, str):
        other = measure_group(groups[expected.than], measure)
    else:
        other = Value(expected.than, error=0.0)
    if one is None or other is None:
        return "not measured", f"{measure.name} is missing"
    told = f"{expected.of} {measure.write(one.mean, one.spread)}, "
    if isinstance(expected.than, str):
        told += f"{expected.than} {measure.write(other.mean, other.spread)}"
        told += _ratio(one.mean, other.mean)
    else:
        told += f"the bound {measure.write(other.mean)}"
    if one.may_be(other):
        return "too close to tell", told
    return ("held" if (one.mean < other.mean) == expected.lower else "did not hold"), told


def _ratio(one: float, other: float) -> str:
    if one <= 0 or other <= 0:
        return ""
    times = number(max(one, other) / min(one, other))
    return "" if times == "1" else f" ({times} times)"


def name_best(groups: Groups, measures: Sequence[Measure]) -> list[str]:
    """Say which group is the best, by the sum of its places in several measures, and why.

    The first measure breaks ties. Nothing is said where a group lacks a measure.
    """
    columns: list[dict[str, Value]] = []
    for measure in measures:
        found = {name: measure_group(runs, measure) for name, runs in groups.items()}
        columns.append({name: value for name, value in found.items() if value is not None})
    if len(groups) < 2 or not columns or any(len(column) < len(groups) for column in columns):
        return []
    pairs = list(zip(measures, columns, strict=True))
    places = {name: [_place(name, column, m) for m, column in pairs] for name in groups}
    ranked = sorted(groups, key=lambda name: (sum(places[name]), places[name][0]))
    sums = ", ".join(f"{name} {sum(places[name])}" for name in ranked)
    first = f"Best is {ranked[0]}, by the sum of its places in {len(measures)} measures"
    return [f"{first} ({sums}; least is best).", *(_stands(ranked[0], c, m) for m, c in pairs)]


def _place(name: str, values: Mapping[str, Value], measure: Measure) -> int:
    own = values[name].mean
    better = [v for v in values.values() if (v.mean > own if measure.higher else v.mean < own)]
    return 1 + len(better)


def _stands(name: str, values: Mapping[str, Value], measure: Measure) -> str:
    """Say how a group stands against the best of the others."""
    own = values[name]
    others = sorted((n for n in values if n != name), key=lambda n: _place(n, values, measure))
    rival = values[others[0]]
    told = (
        f"{measure.write(own.mean, own.spread)} against {measure.write(rival.mean, rival.spread)} "
        f"of {others[0]}"
    )
    if own.mean == rival.mean:
        return f"In {measure.name} it is level with {others[0]}: {told}."
    place = _place(name, values, measure)
    word = {1: "first", 2: "second", 3: "third"}.get(place, f"number {place} of all")
    return f"In {measure.name} it is {word}: {told}{', which may be chance' * own.may_be(rival)}."
