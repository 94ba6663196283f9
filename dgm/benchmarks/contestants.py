"""Run the loops that are compared, each in its own process, so that each has its own peak memory.

On a CPU they take turns, so that changes in the machine's load affect all of them alike. On a GPU
each starts after the previous one has ended: together they would not fit into its memory.
"""

from __future__ import annotations

import contextlib
import json
import select
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from dgm.common.errors import UserError
from dgm.common.exit_codes import MISTAKE

ROOT = Path(__file__).resolve().parents[2]


class LoopError(RuntimeError):
    """A loop ended by itself, or did not answer in time."""


@dataclass(frozen=True)
class Race:
    """How loops are measured."""

    rounds: int
    steps: int  # of a turn
    batch: int
    deadline: float  # by time.monotonic()
    one_by_one: bool
    inspected: str  # whose steps are looked into
    with_parts: bool  # and taken apart, which a CPU allows


class Contestant:
    """A loop in a process of its own."""

    def __init__(self, name: str, asked: dict[str, Any], folder: Path, deadline: float):
        folder.mkdir()
        self.name, self.log, self.deadline = name, folder / "log.txt", deadline
        words = [sys.executable, "-m", "dgm.benchmarks.loops", json.dumps(asked)]
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=output,
                text=True,
            )  # fmt: skip
        self.ready = False

    def ask(self, **request: int) -> dict[str, Any]:
        """Let it do something and return what it answers; waits until it has warmed up first."""
        if not self.ready:
            self._answer()
            self.ready = True
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:  # it has ended, and `_answer` finds why
            pass
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        """Wait for a line; raises LoopError, or UserError where it ended by a user's mistake."""
        assert self.process.stdout is not None
        left = self.deadline - time.monotonic()
        if left <= 0 or not select.select([self.process.stdout], [], [], min(left, 1e6))[0]:
            raise LoopError("the time was over")
        line = self.process.stdout.readline()
        if not line:
            code, output = self.process.wait(), self.log.read_text(encoding="utf-8").strip()
            if code == MISTAKE:
                raise UserError(output.splitlines()[-1].removeprefix("error: "))
            raise LoopError(f"ended with code {code}: {output[-4000:]}")
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        """End it with all that it started, if it has not ended."""
        end_tree(self.process)


def end_tree(process: subprocess.Popen[str]) -> None:
    """Kill a process and all that it started, compilers and workers of loaders, and await them."""
    children: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        leader = psutil.Process(process.pid)
        leader.suspend()  # so that it starts nothing between the listing and its end
        children = leader.children(recursive=True)
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    process.kill()
    process.communicate()
    ends = time.monotonic() + 10
    while any(map(_runs, children)) and time.monotonic() < ends:
        time.sleep(0.01)  # a killed process still holds its memory for a moment


def _runs(process: psutil.Process) -> bool:
    """Return whether a process is running; a zombie is not."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def run_race(wanted: dict[str, dict[str, Any]], race: Race, folder: Path) -> dict[str, Any]:
    """Return `loops`, {name: figures or why it failed}, and `parts` and `profile` of one of them.

    Raises UserError if the first loop ended because of a user's mistake, LoopError if all failed.
    """
    found: dict[str, Any] = {"loops": {}, "parts": {}, "profile": {}}
    groups = [[name] for name in wanted] if race.one_by_one else [list(wanted)]
    for number, names in enumerate(groups):
        own = folder / f"group-{number}"
        own.mkdir()
        _run_group({name: wanted[name] for name in names}, race, own, found)
    found["loops"] = {name: found["loops"][name] for name in wanted}
    failures = {name: loop["failed"] for name, loop in found["loops"].items() if "failed" in loop}
    if len(failures) == len(wanted):
        raise LoopError("\n".join(f"the loop {name}: {why}" for name, why in failures.items()))
    return found


def _run_group(
    wanted: dict[str, dict[str, Any]], race: Race, folder: Path, found: dict[str, Any]
) -> None:
    """Let loops take turns; one that fails leaves the others theirs."""
    rates: dict[str, list[float]] = {name: [] for name in wanted}
    running: dict[str, Contestant] = {}

    def drop(name: str, error: Exception) -> None:
        if isinstance(error, UserError) and not found["loops"]:
            raise error
        found["loops"][name] = {"failed": str(error), "images_per_s": rates[name]}
        running.pop(name).close()

    try:
        for number, (name, asked) in enumerate(wanted.items()):
            own = folder / str(number)
            running[name] = Contestant(name, {**asked, "folder": str(own)}, own, race.deadline)
            if not _attempt(running[name], {"go": 0}, drop):  # not several warming up at once
                continue
        for _ in range(race.rounds):
            for name, loop in list(running.items()):
                if answer := _attempt(loop, {"go": race.steps}, drop):
                    rates[name].append(race.steps * race.batch / answer["seconds"])
        for name, loop in list(running.items()):
            if answer := _attempt(loop, {"tell": 1}, drop):
                found["loops"][name] = {"images_per_s": rates[name]} | answer
        # Last, since to look into a step takes memory.
        if (last := running.get(race.inspected)) is not None:
            _inspect(last, race, found)
    finally:
        for loop in running.values():
            loop.close()


def _attempt(loop: Contestant, request: dict[str, int], drop: Any) -> dict[str, Any] | None:
    try:
        return loop.ask(**request)
    except (LoopError, UserError) as error:
        drop(loop.name, error)
        return None


def _inspect(loop: Contestant, race: Race, found: dict[str, Any]) -> None:
    """Look into a loop's steps; where that fails its rates stay."""
    timed = race.rounds * race.steps
    try:
        if race.with_parts:
            found["parts"] = loop.ask(parts=min(8, timed))
        found["profile"] = loop.ask(profile=min(3, timed))
    except LoopError as error:
        found["loops"][loop.name]["not_inspected"] = str(error)


def failed(loops: dict[str, Any]) -> Iterable[tuple[str, str]]:
    """Yield name and reason, in one line, of each loop that failed."""
    for name, loop in loops.items():
        if "failed" in loop:
            yield name, loop["failed"].strip().splitlines()[-1][:200]
