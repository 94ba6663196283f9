"""Sentences on curves, computed from their values; none where there are too few points."""

from __future__ import annotations

import math
from itertools import pairwise
from statistics import fmean, pstdev, variance

import numpy as np

from dgm.common.formatting import counted, number, percent
from dgm.common.metric_registry import higher_is_better
from dgm.report.read_run import Curve, Run

_MIN_POINTS = 10  # that a curve needs for sentences on it
_MIN_IN_TENTH = 5
_NUM_PEERS = 3  # runs that the one with the lowest loss is compared with


def summarize_curves(runs: list[Run]) -> list[str]:
    """Return sentences on each run's curves, then on the losses of runs of one family."""
    found = []
    for run in runs:
        subject = f"{run.name}: " if len(runs) > 1 else ""
        for key in run.losses:
            found += [subject + s for s in (_minimum(run, key), _last_tenth(run, key)) if s]
        metrics = [
            key for key in run.keys if key.startswith("eval/") and higher_is_better(key) is False
        ]
        found += [subject + s for key in metrics if (s := _minimum(run, key, 3))]
    for family in dict.fromkeys(run.family for run in runs):
        found += _compare([run for run in runs if run.family == family])
    return found


def _smooth(curve: Curve) -> Curve:
    """Return the running means of a curve, over windows of a twentieth of its points."""
    width = max(1, len(curve.values) // 20)
    means = [fmean(curve.values[max(0, k + 1 - width) : k + 1]) for k in range(len(curve.values))]
    return Curve(curve.seen, means)


def _minimum(run: Run, key: str, min_points: int = _MIN_POINTS) -> str | None:
    """Return a sentence on where the minimum is; None if it is the last value."""
    curve = run.curve(key)
    lowest, where = curve.best()
    last = curve.values[-1]
    if len(curve.values) < min_points or last <= lowest:
        return None
    more = f", {percent(last / lowest - 1)} above" if lowest > 0 else ""
    return (
        f"{key} had its minimum, {number(lowest)}, after {counted(where, 'image')}; "
        f"the last value, after {counted(curve.seen[-1], 'image')}, is {number(last)}{more}."
    )


def _last_tenth(run: Run, key: str) -> str | None:
    """Return a sentence on whether a loss was still falling, given the scatter of its logs."""
    values = run.curve(key).values
    count = len(values) // 10
    if count < _MIN_IN_TENTH:
        return None
    before, after = values[-2 * count : -count], values[-count:]
    change = fmean(after) - fmean(before)
    error = math.sqrt((variance(before) + variance(after)) / count)
    means = f"mean {number(fmean(after))}, of the tenth before {number(fmean(before))}"
    if abs(change) <= 2 * error:
        return f"{key} changed by no more than its scatter over the last tenth ({means})."
    word = "still falling" if change < 0 else "rising"
    return f"{key} was {word} over the last tenth ({means})."


def _compare(runs: list[Run]) -> list[str]:
    """For each kind of loss, compare the run that ended lowest with the next lowest ones."""
    found = []
    for key in dict.fromkeys(key for run in runs for key in run.losses):
        curves = {run.name: _smooth(run.curve(key)) for run in runs}
        names = [name for name, curve in curves.items() if len(curve.values) >= _MIN_POINTS]
        names.sort(key=lambda name: curves[name].values[-1])
        for other in names[1 : 1 + _NUM_PEERS]:
            first = names[0]
            found += _pair(key, first, curves[first], other, curves[other])
    return found


def _pair(key: str, first: str, lower: Curve, other: str, higher: Curve) -> list[str]:
    if (lower.seen, lower.values) == (higher.seen, higher.values):
        return [f"{first} and {other}: {key} is the same at every log."]
    low, high = lower.values[-1], higher.values[-1]
    if low == high:
        return [f"{key} of {first} and of {other} ended equal, at {number(low)}."]
    less = f", {percent(1 - low / high)} lower" if low > 0 else ""
    more_scatter = f"; the logs of the last tenth of {other} scatter by more"
    small = more_scatter if high - low < _scatter(higher) else ""
    ended = (
        f"{key} of {first} ended below that of {other}: {number(low)} after "
        f"{counted(lower.seen[-1], 'image')} against {number(high)} after "
        f"{counted(higher.seen[-1], 'image')}{less}{small}."
    )
    reached_at = {
        name: next(s for s, v in zip(curve.seen, curve.values, strict=True) if v <= high)
        for name, curve in ((first, lower), (other, higher))
    }
    order = sorted(reached_at, key=lambda name: reached_at[name])
    reached = (
        f"The final {key} of {other}, {number(high)}, was first reached by {order[0]}, after "
        f"{counted(reached_at[order[0]], 'image')}, and by {order[1]} after "
        f"{counted(reached_at[order[1]], 'image')}."
    )
    crossing = _crossing(key, first, lower, other, higher)
    return [ended, reached, *([crossing] if crossing else [])]


def _scatter(curve: Curve) -> float:
    tenth = curve.values[-max(1, len(curve.values) // 10) :]
    return pstdev(tenth) if len(tenth) >= _MIN_IN_TENTH else 0.0


def _crossing(key: str, first: str, a: Curve, other: str, b: Curve) -> str | None:
    """Return a sentence on where two curves cross last, over the images that both saw."""
    start, end = max(a.seen[0], b.seen[0]), min(a.seen[-1], b.seen[-1])
    seen = [s for s in np.union1d(a.seen, b.seen) if start <= s <= end]
    differences = np.interp(seen, a.seen, a.values) - np.interp(seen, b.seen, b.values)
    gaps = [(s, gap) for s, gap in zip(seen, differences, strict=True) if gap != 0]
    if len(gaps) < _MIN_POINTS:
        return None
    crossings = [
        s + (t - s) * g / (g - h) for (s, g), (t, h) in pairwise(gaps) if (g < 0) != (h < 0)
    ]
    below, above = (first, other) if gaps[-1][1] < 0 else (other, first)
    if not crossings:
        return (
            f"{key} of {below} lies below that of {above} from {counted(gaps[0][0], 'image')} "
            f"to {counted(gaps[-1][0], 'image')}."
        )
    times = "once" if len(crossings) == 1 else f"{len(crossings)} times, the last time"
    return (
        f"{key} of {first} and of {other}, smoothed, cross {times} after "
        f"{counted(crossings[-1], 'image')}; "
        f"from there to {counted(gaps[-1][0], 'image')} that of {below} is below."
    )
