"""Checks with a time limit each, and the report of what they found."""

from __future__ import annotations

import json
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class Skipped(Exception):  # noqa: N818
    """A check that cannot be made here; the message says why."""


@dataclass(frozen=True)
class Context:
    """Where checks work, and on what."""

    shards: Path
    scratch: Path
    gpu: bool
    quick: bool  # fewer and smaller ones

    @property
    def device(self) -> str:
        """Return the device that is checked."""
        return "cuda" if self.gpu else "cpu"


@dataclass(frozen=True)
class Check:
    """A check returns what it found in one line, and raises AssertionError where it is wrong."""

    name: str
    work: Callable[[Context], str]
    seconds: float
    quick: bool  # cheap enough for a trial on a CPU
    needs_gpu: bool


class Group:
    """Checks that one process makes in order."""

    def __init__(self) -> None:
        self.checks: list[Check] = []

    def check(
        self, name: str, seconds: float = 60, quick: bool = False, needs_gpu: bool = False
    ) -> Callable[[Callable[[Context], str]], Callable[[Context], str]]:
        """Add a function to the group."""

        def add(work: Callable[[Context], str]) -> Callable[[Context], str]:
            self.checks.append(Check(name, work, seconds, quick, needs_gpu))
            return work

        return add

    def chosen(self, context: Context) -> list[Check]:
        """Choose the checks that are to be made."""
        return [check for check in self.checks if check.quick or not context.quick]


def carry_out(check: Check, context: Context) -> dict[str, Any]:
    """Make one check; returns its state, what it found and its seconds."""
    start = time.monotonic()
    found: dict[str, Any] = {"state": "passed"}
    try:
        if check.needs_gpu and not context.gpu:
            raise Skipped("needs a GPU")
        found["detail"] = check.work(context)
    except Skipped as reason:
        found |= {"state": "skipped", "detail": str(reason)}
    except Exception as error:  # whatever it is, the others have their turn
        message = f"{type(error).__name__}: {error}"
        found |= {
            "state": "failed",
            "detail": message[:600],
            "trace": traceback.format_exc()[-2000:],
        }
    return found | {"seconds": round(time.monotonic() - start, 1)}


class Report:
    """The file of what was found, written anew after each check."""

    def __init__(self, path: Path):
        """Begin with an empty file at `path`."""
        self.path, self.found = path, dict[str, dict[str, Any]]()
        self._lock = threading.Lock()
        self._write()

    def add(self, name: str, found: dict[str, Any]) -> None:
        """Print a result and write all of them."""
        with self._lock:
            self.found[name] = found
            print(
                f"{found['state']:8} {name}: {found['detail']} ({found['seconds']} s)", flush=True
            )
            self._write()

    def _write(self) -> None:
        unfinished = self.path.with_name(f"{self.path.name}.part")
        unfinished.write_text(json.dumps(self.found, indent=1))
        unfinished.replace(self.path)


def apart(made: Any, expected: Any) -> float:
    """Return the relative distance |made - expected| / |expected| of two tensors."""
    made, expected = made.detach().double().cpu(), expected.detach().double().cpu()
    return float((made - expected).norm() / expected.norm().clamp(min=1e-30))
