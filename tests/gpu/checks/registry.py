"""Checks with a time limit each, and the report of their results."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dgm.common.atomic_io import write_whole
from tests.gpu.schedule import Outcome, timed


@dataclass(frozen=True)
class Context:
    """Data, device and extent of the checks."""

    shards: Path
    scratch: Path
    gpu: bool
    quick: bool  # fewer and smaller checks

    @property
    def device(self) -> str:
        return "cuda" if self.gpu else "cpu"


@dataclass(frozen=True)
class Check:
    """A check: `work` returns a line of results, or raises AssertionError."""

    name: str
    work: Callable[[Context], str]
    seconds: float = 60
    quick: bool = False  # fast enough for a trial on a CPU
    needs_gpu: bool = False


class Group:
    """Checks that one process runs in order."""

    def __init__(self) -> None:
        self.checks: list[Check] = []

    def check(self, name: str, seconds: float = 60, **options: bool) -> Callable:
        """Return a decorator that adds a function to the group."""

        def add(work: Callable[[Context], str]) -> Callable[[Context], str]:
            self.checks.append(Check(name, work, seconds, **options))
            return work

        return add

    def chosen(self, context: Context) -> list[Check]:
        """Return all checks, or the quick ones."""
        return [check for check in self.checks if check.quick or not context.quick]


def carry_out(check: Check, context: Context) -> Outcome:
    """Run a check; return its outcome."""
    if check.needs_gpu and not context.gpu:
        return Outcome("skipped", "needs a GPU")
    return timed(lambda: check.work(context), "passed")


class Report:
    """The file of results, rewritten after each check."""

    def __init__(self, path: Path):
        self.path, self.found = path, dict[str, Outcome]()
        self._lock = threading.Lock()
        write_whole(path, "{}")

    def add(self, name: str, found: Outcome) -> None:
        """Print a result and write all of them."""
        with self._lock:
            self.found[name] = found
            print(f"{found.state:8} {name}: {found.detail} ({found.seconds} s)", flush=True)
            everything = {name: asdict(each) for name, each in self.found.items()}
            write_whole(self.path, json.dumps(everything, indent=1))


def relative_error(made: Any, expected: Any) -> float:
    """Return |made - expected| / |expected| of two tensors."""
    made, expected = made.detach().double().cpu(), expected.detach().double().cpu()
    return float((made - expected).norm() / expected.norm().clamp(min=1e-30))
