"""What can be said of curves by computing alone; with too few points nothing is."""

from __future__ import annotations

import math
from bisect import bisect_left
from itertools import pairwise
from statistics import fmean, pstdev, variance

from dgm.common.formatting import counted, number, percent
from dgm.common.metric_registry import higher_is_better
from dgm.report.read_run import Curve, Run

MIN_POINTS = 10  # logs of a curve of which anything is said
_MIN_IN_TENTH = 5
_PEERS = 3  # runs that the one with the lowest loss is compared with


def observe(runs: list[Run]) -> list[str]:
    """Compute sentences on each run's curves, then on the losses of runs of one family."""
    found = []
    for run in runs:
        subject = f"{run.name}: " if len(runs) > 1 else ""
        for key in run.losses:
            found += [subject + s for s in (_least(run, key), _last_tenth(run, key)) if s]
        measures = [
            key for key in run.keys if key.startswith("eval/") and higher_is_better(key) is False
        ]
        found += [subject + s for key in measures if (s := _least(run, key, 3))]
    for family in dict.fromkeys(run.family for run in runs):
        found += _compare([run for run in runs if run.family == family])
    return found


def smooth(curve: Curve) -> Curve:
    """Take the mean of each value and those before it, over a twentieth of the curve."""
    width = max(1, len(curve.values) // 20)
    means = [fmean(curve.values[max(0, k + 1 - width) : k + 1]) for k in range(len(curve.values))]
    return Curve(curve.seen, means)


def _least(run: Run, key: str, enough: int = MIN_POINTS) -> str | None:
    """Say where a curve was least, where that is not its end."""
    curve = run.curve(key)
    least, where = curve.least()
    last = curve.values[-1]
    if len(curve.values) < enough or last <= least:
        return None
    more = f", {percent(last / least - 1)} above" if least > 0 else ""
    return (
        f"{key} was least, {number(least)}, after {counted(where, 'image')}; "
        f"the last value, after {counted(curve.seen[-1], 'image')}, is {number(last)}{more}."
    )


def _last_tenth(run: Run, key: str) -> str | None:
    """Say whether a loss still fell, against the scatter of its logs."""
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
    """Compare the run whose loss ended lowest with those that follow, for each kind of loss."""
    found = []
    for key in dict.fromkeys(key for run in runs for key in run.losses):
        curves = {run.name: smooth(run.curve(key)) for run in runs}
        names = [name for name, curve in curves.items() if len(curve.values) >= MIN_POINTS]
        names.sort(key=lambda name: curves[name].values[-1])
        for other in names[1 : 1 + _PEERS]:
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
    small = "; the logs of its last tenth scatter by more" if high - low < _scatter(higher) else ""
    ended = (
        f"{key} of {first} ended below that of {other}: {number(low)} after "
        f"{counted(lower.seen[-1], 'image')} against {number(high)} after "
        f"{counted(higher.seen[-1], 'image')}{less}{small}."
    )
    met = {
        name: next(s for s, v in zip(curve.seen, curve.values, strict=True) if v <= high)
        for name, curve in ((first, lower), (other, higher))
    }
    order = sorted(met, key=lambda name: met[name])
    reached = (
        f"The final {key} of {other}, {number(high)}, was first reached by {order[0]}, after "
        f"{counted(met[order[0]], 'image')}, and by {order[1]} after "
        f"{counted(met[order[1]], 'image')}."
    )
    crossing = _crossing(key, first, lower, other, higher)
    return [ended, reached, *([crossing] if crossing else [])]


def _scatter(curve: Curve) -> float:
    tenth = curve.values[-max(1, len(curve.values) // 10) :]
    return pstdev(tenth) if len(tenth) >= _MIN_IN_TENTH else 0.0


def _crossing(key: str, first: str, a: Curve, other: str, b: Curve) -> str | None:
    """Say where two curves cross last, or that they do not, over the images that both saw."""
    start, end = max(a.seen[0], b.seen[0]), min(a.seen[-1], b.seen[-1])
    places = sorted({s for s in (*a.seen, *b.seen) if start <= s <= end})
    gaps = [(s, _at(a, s) - _at(b, s)) for s in places]
    gaps = [(s, gap) for s, gap in gaps if gap != 0]
    if len(gaps) < MIN_POINTS:
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


def _at(curve: Curve, seen: float) -> float:
    """Interpolate between two logs."""
    k = bisect_left(curve.seen, seen)
    if curve.seen[k] == seen:
        return curve.values[k]
    (s, t), (u, v) = curve.seen[k - 1 : k + 1], curve.values[k - 1 : k + 1]
    return u + (v - u) * (seen - s) / (t - s)
