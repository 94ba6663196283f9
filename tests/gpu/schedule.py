"""One budget for several parts, the most valuable first."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dgm.common.errors import UserError


@dataclass(frozen=True)
class Part:
    """Something to measure: its work gets its limit in seconds and returns what it found."""

    name: str
    seconds: float  # its part of the plan
    least: float  # with less it is left out
    work: Callable[[float], str]
    needs: Callable[[], str | None] = lambda: None  # why it cannot be done here
    essential: bool = False  # without it nothing works: it may take the others' time


@dataclass
class Outcome:
    """What became of a part."""

    state: str  # done, failed, or left out
    detail: str
    seconds: float = 0.0
    limit: float | None = None


class Budget:
    """The seconds that are left of a whole."""

    def __init__(self, seconds: float, reserve: float, began: float | None = None):
        """Keep `reserve` back for what follows all parts."""
        self.seconds, self.reserve = seconds, reserve
        self.began = time.monotonic() if began is None else began

    def elapsed(self) -> float:
        """Return the seconds spent."""
        return time.monotonic() - self.began

    def left(self) -> float:
        """Return the seconds that parts may still take."""
        return self.seconds - self.reserve - self.elapsed()


def limit_of(part: Part, later: Sequence[Part], left: float) -> float:
    """Return a part's limit: its seconds, and what the plan does not need for the `later` ones."""
    if part.essential:
        return left
    surplus = left - part.seconds - sum(other.seconds for other in later)
    return min(left, part.seconds + max(0.0, surplus))


def run_parts(
    parts: Sequence[Part], budget: Budget, report: Callable[[str, Outcome], Any]
) -> dict[str, Outcome]:
    """Run parts in order; one that fails or does not fit does not stop the others."""
    outcomes: dict[str, Outcome] = {}
    for number, part in enumerate(parts):
        later = [other for other in parts[number + 1 :] if other.needs() is None]
        limit = limit_of(part, later, budget.left())
        if (reason := part.needs()) is not None:
            outcome = Outcome("left out", reason)
        elif limit < part.least:
            outcome = Outcome("left out", f"{max(0.0, limit):.0f} s left, it takes {part.least:g}")
        else:
            outcome = _run(part, limit)
        outcomes[part.name] = outcome
        report(part.name, outcome)
    return outcomes


def _run(part: Part, limit: float) -> Outcome:
    start = time.monotonic()
    try:
        detail, state = part.work(limit), "done"
    except Exception as error:  # whatever it is, the others have their turn
        detail, state = str(error) or type(error).__name__, "failed"
    return Outcome(state, detail, round(time.monotonic() - start, 1), round(limit, 1))


def check_budget(seconds: float, parts: Sequence[Part], reserve: float, first: int) -> None:
    """Raise UserError where not even the `first` parts fit."""
    least = reserve + sum(part.least for part in parts[:first])
    if seconds < least:
        names = ", ".join(part.name for part in parts[:first])
        raise UserError(f"SECONDS is {seconds:g}: give {least:g} or more, which {names} take")
