"""One time budget for several parts, the most valuable first."""

from __future__ import annotations

import functools
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tests.gpu.processes import CommandError


@dataclass(frozen=True)
class Part:
    """Something to measure: `work` gets its time limit and returns one line of results."""

    name: str
    seconds: float  # planned time
    min_seconds: float  # with less time the part is left out
    work: Callable[[float], str]
    obstacle: Callable[[], str | None] = lambda: None  # why it cannot run on this machine
    essential: bool = False  # the other parts depend on it, so it may use their time


@dataclass
class Outcome:
    """The result of a part or a check."""

    state: str  # done, passed, failed, skipped, or left out
    detail: str
    seconds: float = 0.0
    limit: float | None = None
    trace: str | None = None


@dataclass(frozen=True)
class Budget:
    """Time for all parts."""

    seconds: float
    reserve: float  # seconds for what follows the parts
    began: float  # time.monotonic() at the start

    def elapsed(self) -> float:
        """Return the seconds spent."""
        return time.monotonic() - self.began

    def left(self) -> float:
        """Return the seconds that parts may still take."""
        return self.seconds - self.reserve - self.elapsed()


def limit_of(part: Part, later: Sequence[Part], left: float) -> float:
    """Return a part's limit: its planned time, and what the plan does not need for later ones."""
    if part.essential:
        return left
    return min(left, max(part.seconds, left - sum(other.seconds for other in later)))


def run_parts(parts: Sequence[Part], budget: Budget, report: Callable[[str, Outcome], Any]) -> None:
    """Run parts in order; one that fails or does not fit does not stop the others."""
    for number, part in enumerate(parts):
        later = [other for other in parts[number + 1 :] if other.obstacle() is None]
        limit = limit_of(part, later, budget.left())
        if (reason := part.obstacle()) is not None:
            outcome = Outcome("left out", reason)
        elif limit < part.min_seconds:
            detail = f"{max(0.0, limit):.0f} s left, it takes {part.min_seconds:g}"
            outcome = Outcome("left out", detail)
        else:
            outcome = timed(functools.partial(part.work, limit))
            outcome.limit = round(limit, 1)
        report(part.name, outcome)


def timed(work: Callable[[], str], state: str = "done") -> Outcome:
    """Run work; any exception is an outcome."""
    start = time.monotonic()
    try:
        outcome = Outcome(state, work())
    except Exception as error:  # any: the others still run
        reason = error if isinstance(error, CommandError) else f"{type(error).__name__}: {error}"
        outcome = Outcome("failed", str(reason)[:600], trace=traceback.format_exc()[-2000:])
    outcome.seconds = round(time.monotonic() - start, 1)
    return outcome
