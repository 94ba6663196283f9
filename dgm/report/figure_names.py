"""Figures of a run by the words of an exercise's file.

NAME/PART               of evaluation.json, as distances_cifar/fd_cifar
bits per dimension      exact for dequantised data (a flow), else a bound, else that by the ODE
final KEY, least KEY    of a metric of metrics.jsonl
least after KEY         the share of the run at which it was least
denoised STEPS/NAME     of denoised/denoising.json
wall time, images/s
spread of MEASURE       over the runs of a group: standard deviation as a share of the mean
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from dgm.common.formatting import duration, percent
from dgm.common.metric_registry import find_metric, higher_is_better, is_fraction
from dgm.report.denoising import denoised_figure, name_of_figure
from dgm.report.formatting import figure
from dgm.report.read_run import Curve, Run

_ANY_BITS = ("bits_per_dim/exact", "bits_per_dim/bound", "bits_per_dim_ode/bound")
_SPREAD_OF = "spread of "
_OF_CURVES: dict[str, Callable[[Curve, Run], float]] = {
    "final": lambda curve, run: curve.values[-1],
    "least": lambda curve, run: curve.least()[0],
    "least after": lambda curve, run: curve.least()[1] / run.images_seen,
}


@dataclass(frozen=True)
class Measure:
    """What is compared of runs."""

    key: str  # as in the file
    name: str  # as people write it
    of: Callable[[Run], float | None]  # None where a run has none
    higher: bool | None  # whether the higher value is the better; None: neither is
    unit: Literal["share", "seconds", "number"] = "number"
    spread_of: Measure | None = None  # whose scatter over runs it is

    def write(self, mean: float, spread: float | None = None) -> str:
        """Write a value, with its standard deviation where there is one."""
        if self.unit == "number":
            return figure(self.key, mean) + (f" ± {spread:.2g}" if spread else "")
        told = percent if self.unit == "share" else duration
        return told(mean) + (f" ± {told(spread)}" if spread else "")


def read_measure(text: str) -> Measure:
    """Read a measure; raises ValueError where the text is none."""
    if text.startswith(_SPREAD_OF):
        of = read_measure(text.removeprefix(_SPREAD_OF))
        return Measure(text, f"spread over runs of {of.name}", of.of, False, "share", of)
    if text == "bits per dimension":
        return Measure(
            text, f"{text} (flows: exact for dequantised data; else a bound)", _any_bits, False
        )
    if text == "wall time":
        return Measure(text, text, Run.wall_s, False, "seconds")
    if text == "images/s":
        return Measure(text, text, lambda run: run.median("time/images_per_s"), True)
    how, _, key = text.rpartition(" ")
    first, slash, last = key.partition("/")
    if not (first and slash and last):
        raise ValueError(text)
    if how == "denoised" and first.isdigit():
        name = f"{name_of_figure(last)} from {first} steps of noise"
        return _told(text, name, lambda run: denoised_figure(run.folder, int(first), last))
    if how in _OF_CURVES:
        found = _told(text, text, lambda run: _of_curve(run, how, key))
        return Measure(text, text, found.of, None, "share") if how == "least after" else found
    if how:
        raise ValueError(text)
    return _told(text, _name_of_result(first, last), lambda run: run.results().get(text))


def _told(key: str, name: str, of: Callable[[Run], float | None]) -> Measure:
    """Make a measure whose own words say what it is and which end is the better."""
    return Measure(key, name, of, higher_is_better(key), "share" if is_fraction(key) else "number")


def _any_bits(run: Run) -> float | None:
    results = run.results()
    return next((results[name] for name in _ANY_BITS if name in results), None)


def _of_curve(run: Run, how: str, key: str) -> float | None:
    curve = run.curve(key)
    return _OF_CURVES[how](curve, run) if curve.values else None


def _name_of_result(name: str, part: str) -> str:
    """Write distances_cifar/fd_cifar as FD-cifar."""
    told, about = find_metric(part).label, name.split("_")[0]
    alone = part in ("exact", "bound") or about in ("distances", "precision", "cost", "class")
    return told if alone or told == about else f"{about}: {told}"
