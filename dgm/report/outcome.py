"""What came out of runs that were to answer a question: groups compared, expectations met or not.

A group holds runs that differ in their seed only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal

from dgm.report.denoising import denoised_figure, name_of_figure
from dgm.report.measured import label
from dgm.report.numbers import duration, figure, higher_is_better, is_share, number, percent
from dgm.report.read import SPREAD, Curve, Run

Groups = Mapping[str, Sequence[Run]]
Verdict = Literal["held", "did not hold", "too close to tell", "not measured"]

SURE = 2.0
"""Standard errors of a difference within which it may be chance."""
CLOSE = 0.01
"""Share within which it may be chance where no seeds tell how far figures scatter."""
WALL = "wall time"
SPEED = "images/s"
BITS = "bits per dimension"
_ANY_BITS = ("bits_per_dim/exact", "bits_per_dim/bound", "bits_per_dim_ode/bound")
_SPREAD_OF = "spread of "
_AFTER = "least after"
_OF_CURVES = ("final", "least", _AFTER)
_DENOISED = "denoised"
_NUM_SEEDS = "num_seeds"


@dataclass(frozen=True)
class Expectation:
    """What was expected before anything ran: a measure of one group below or above another's.

    `than` is a group, or a number.
    """

    says: str
    measure: str
    lower: bool
    of: str
    than: str | float


@dataclass(frozen=True)
class Value:
    """A measure of a group: the mean over its runs, and how far that may be off by chance."""

    mean: float
    runs: int
    spread: float | None = None  # standard deviation over runs, or over seeds of images of one run
    error: float = 0.0  # standard error of the mean, 0 where it is not known

    def text(self, measure: str) -> str:
        """Write it with its spread."""
        if measure == WALL:
            return duration(self.mean)
        share = is_share(measure) or measure.startswith((_SPREAD_OF, _AFTER))
        mean = percent(self.mean) if share else figure(measure, self.mean)
        if not self.spread:
            return mean
        return f"{mean} ± {100 * self.spread if share else self.spread:.2g}{' %' * share}"


def value_of(run: Run, measure: str) -> float | None:
    """Give a measure of a run; None where it has none.

    A figure of `evaluation.json` as NAME/PART; `bits per dimension`, exact, else a bound, else that
    by the ODE; `final KEY`, `least KEY` and `least after KEY` (the share of the run at which it was
    least) of a logged metric; `denoised STEPS/NAME` of `denoising.json`; `wall time` (s);
    `images/s`.
    """
    if measure == BITS:
        results = run.results()
        return next((results[name] for name in _ANY_BITS if name in results), None)
    if measure == WALL:
        return run.wall_s()
    if measure == SPEED:
        return run.median("time/images_per_s")
    how, _, key = measure.rpartition(" ")
    if how == _DENOISED:
        steps, _, name = key.partition("/")
        return denoised_figure(run.folder, int(steps), name)
    if how not in _OF_CURVES:
        return run.results().get(measure)
    curve = run.curve(key)
    if not curve.values:
        return None
    ways: dict[str, Callable[[Curve], float]] = {
        "final": lambda c: c.values[-1],
        "least": lambda c: c.least()[0],
        _AFTER: lambda c: c.least()[1] / run.images_seen,
    }
    return ways[how](curve)


def is_measure(measure: str) -> bool:
    """Say whether a text can be a measure at all."""
    measure = measure.removeprefix(_SPREAD_OF)
    how, space, key = measure.rpartition(" ")
    if measure in (WALL, SPEED, BITS):
        return True
    if how == _DENOISED:
        return key.split("/")[0].isdigit() and "/" in key
    return "/" in key and (how in _OF_CURVES if space else True)


def name_of(measure: str) -> str:
    """Write a measure as people do: distances_cifar/fd_cifar as FD-cifar."""
    if measure.startswith(_SPREAD_OF):
        return f"spread over runs of {name_of(measure.removeprefix(_SPREAD_OF))}"
    if measure == BITS:
        return f"{BITS} (exact for flows, else a bound)"
    how, _, key = measure.rpartition(" ")
    if how == _DENOISED:
        steps, _, name = key.partition("/")
        return f"{name_of_figure(name)} from {steps} steps of noise"
    if how or "/" not in key:
        return measure
    name, part = key.split("/", 1)
    named = part in ("exact", "bound") or name.startswith(
        ("distances", "precision", "cost", "class")
    )
    about = name.split("_")[0]
    return label(part) if named or label(part) == about else f"{about}: {label(part)}"


def higher_wins(measure: str) -> bool | None:
    """Say whether the higher value of a measure is the better; None where neither is."""
    if measure == SPEED:
        return True
    if measure in (WALL, BITS) or measure.startswith(_SPREAD_OF):
        return False
    return None if measure.startswith(_AFTER) else higher_is_better(measure)


def measure_group(runs: Sequence[Run], measure: str) -> Value | None:
    """Give a measure of a group; None where a run of it has none.

    `spread of MEASURE` is the standard deviation over its runs, as a share of their mean.
    """
    if measure.startswith(_SPREAD_OF):
        whole = measure_group(runs, measure.removeprefix(_SPREAD_OF))
        if whole is None or whole.runs < 2 or not whole.mean:
            return None
        assert whole.spread is not None
        return Value(whole.spread / abs(whole.mean), 1)
    values = [value_of(run, measure) for run in runs]
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    if len(known) > 1:
        spread = stdev(known)
        return Value(fmean(known), len(known), spread, spread / math.sqrt(len(known)))
    name, _, part = measure.rpartition("/")
    found = runs[0].evaluation.get(name)
    spreads = found.get(SPREAD) if isinstance(found, dict) else None
    over = spreads.get(part) if isinstance(spreads, dict) else None
    seeds = found.get(_NUM_SEEDS, 0) if isinstance(found, dict) else 0
    if isinstance(over, float) and isinstance(seeds, int) and seeds > 1:
        return Value(known[0], 1, over, over / math.sqrt(seeds))
    return Value(known[0], 1)


def judge(expected: Expectation, groups: Groups) -> tuple[Verdict, str]:
    """Say whether an expectation held, and by which figures."""
    one = measure_group(groups[expected.of], expected.measure)
    if isinstance(expected.than, str):
        other = measure_group(groups[expected.than], expected.measure)
        name = expected.than
    else:
        other, name = Value(expected.than, 0), "the bound"
    if one is None or other is None:
        return "not measured", f"{name_of(expected.measure)} is missing"
    told = f"{expected.of} {one.text(expected.measure)}, {name} {other.text(expected.measure)}"
    if other.runs:
        told += _ratio(one.mean, other.mean)
    if _may_be_chance(one, other):
        return "too close to tell", told
    return ("held" if (one.mean < other.mean) == expected.lower else "did not hold"), told


def _may_be_chance(one: Value, other: Value) -> bool:
    error = math.hypot(one.error, other.error)
    if not error and other.runs:
        return abs(one.mean - other.mean) <= CLOSE * max(abs(one.mean), abs(other.mean))
    return abs(one.mean - other.mean) <= SURE * error


def _ratio(one: float, other: float) -> str:
    if one <= 0 or other <= 0:
        return ""
    low, high = sorted((one, other))
    times = number(high / low)
    return "" if times == "1" else f" ({times} times)"


@dataclass(frozen=True)
class Ranking:
    """Groups by the sum of their places in several measures, the best first."""

    names: list[str]
    sums: dict[str, int]
    firsts: dict[str, list[str]]  # of each group the measures in which it is first


def rank(groups: Groups, measures: Sequence[str]) -> Ranking | None:
    """Rank groups by measures of which one end is the better; the first measure breaks ties.

    None where a measure is missing for a group.
    """
    places: dict[str, list[int]] = {name: [] for name in groups}
    firsts: dict[str, list[str]] = {name: [] for name in groups}
    for measure in measures:
        found = {name: measure_group(runs, measure) for name, runs in groups.items()}
        means = {name: value.mean for name, value in found.items() if value is not None}
        if len(means) < len(groups):
            return None
        sign = -1 if higher_wins(measure) else 1
        order = sorted({sign * mean for mean in means.values()})
        for name, mean in means.items():
            place = order.index(sign * mean)
            places[name].append(place + 1)
            if place == 0:
                firsts[name].append(measure)
    sums = {name: sum(own) for name, own in places.items()}
    names = sorted(groups, key=lambda name: (sums[name], places[name][0]))
    return Ranking(names, sums, firsts)


def why_best(ranking: Ranking, groups: Groups, measures: Sequence[str]) -> list[str]:
    """Say which group is the best of several, and by which figures."""
    best = ranking.names[0]
    places = ", ".join(f"{name} {ranking.sums[name]}" for name in ranking.names)
    said = [
        f"Best is {best}, by the sum of its places in {len(measures)} measures ({places}; least is "
        "best)."
    ]
    for measure in measures:
        found = {name: measure_group(groups[name], measure) for name in ranking.names}
        values = {name: value for name, value in found.items() if value is not None}
        sign = -1 if higher_wins(measure) else 1
        order = sorted(values, key=lambda name: sign * values[name].mean)
        place = order.index(best)
        rival = order[1] if place == 0 else order[0]
        word = "first" if place == 0 else _place(place + 1)
        told = f"{values[best].text(measure)} against {values[rival].text(measure)} of {rival}"
        if values[best].mean == values[rival].mean:
            said.append(f"In {name_of(measure)} it is level with {rival}: {told}.")
            continue
        chance = _may_be_chance(values[best], values[rival])
        said.append(
            f"In {name_of(measure)} it is {word}: {told}{', which may be chance' * chance}."
        )
    return said


def _place(place: int) -> str:
    return {2: "second", 3: "third"}.get(place, f"number {place} of all")
