"""Run training loops, each in its own process, so that each has its own peak memory.

On a CPU they take turns, so that the machine's load affects all of them alike. On a GPU each starts
after the previous one has ended, as together they would not fit into its memory.
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
class Plan:
    """How loops are timed."""

    rounds: int
    steps: int  # of a turn
    batch: int
    deadline: float  # by time.monotonic()
    sequential: bool
    profiled: str  # the loop whose steps are profiled
    with_parts: bool  # and timed in parts, on a CPU


class LoopProcess:
    """A loop in a process of its own."""

    def __init__(self, name: str, config: dict[str, Any], folder: Path, deadline: float):
        folder.mkdir()
        self.name, self.log, self.deadline = name, folder / "log.txt", deadline
        config = {**config, "folder": str(folder)}
        words = [sys.executable, "-m", "dgm.benchmarks.loops", json.dumps(config)]
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=output,
                text=True,
            )  # fmt: skip
        self.ready = False

    def request(self, **request: int) -> dict[str, Any]:
        """Send a request and return the answer, after the first one's warm-up.

        Raise LoopError, or UserError if the loop ended by a user's mistake.
        """
        if not self.ready:
            self._answer()
            self.ready = True
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: `_answer` reports why
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        left = self.deadline - time.monotonic()
        if left <= 0 or not select.select([self.process.stdout], [], [], min(left, 1e6))[0]:
            raise LoopError("timed out")
        line = self.process.stdout.readline()
        if not line:
            code, output = self.process.wait(), self.log.read_text(encoding="utf-8").strip()
            if code == MISTAKE:
                raise UserError(output.splitlines()[-1].removeprefix("error: "))
            raise LoopError(f"ended with code {code}: {output[-4000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """Kill it with all processes that it started, compilers and loader workers."""
        children: list[psutil.Process] = []
        with contextlib.suppress(psutil.NoSuchProcess):
            leader = psutil.Process(self.process.pid)
            leader.suspend()  # so that it starts none after they are listed
            children = leader.children(recursive=True)
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        self.process.kill()
        self.process.communicate()
        deadline = time.monotonic() + 10
        while any(map(_is_running, children)) and time.monotonic() < deadline:
            time.sleep(0.01)  # a killed process holds its memory for a moment


def _is_running(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def time_loops(configs: dict[str, dict[str, Any]], plan: Plan, folder: Path) -> dict[str, Any]:
    """Return `loops`, {name: results or why it failed}, and `parts` and `profile` of one of them.

    Raise UserError if the first loop ended by a user's mistake, LoopError if all failed.
    """
    found: dict[str, Any] = {"loops": {}, "parts": {}, "profile": {}}
    groups = [[name] for name in configs] if plan.sequential else [list(configs)]
    for number, names in enumerate(groups):
        own = folder / f"group-{number}"
        own.mkdir()
        _time_group({name: configs[name] for name in names}, plan, own, found)
    found["loops"] = {name: found["loops"][name] for name in configs}
    failures = {name: loop["failed"] for name, loop in found["loops"].items() if "failed" in loop}
    if len(failures) == len(configs):
        raise LoopError("\n".join(f"the loop {name}: {why}" for name, why in failures.items()))
    return found


def _time_group(
    configs: dict[str, dict[str, Any]], plan: Plan, folder: Path, found: dict[str, Any]
) -> None:
    """Time loops in turns; one that fails is dropped."""
    rates: dict[str, list[float]] = {name: [] for name in configs}
    running: dict[str, LoopProcess] = {}

    def request(loop: LoopProcess, **request: int) -> dict[str, Any] | None:
        try:
            return loop.request(**request)
        except (LoopError, UserError) as error:
            if isinstance(error, UserError) and not found["loops"]:
                raise
            found["loops"][loop.name] = {"failed": str(error), "images_per_s": rates[loop.name]}
            running.pop(loop.name).close()
            return None

    try:
        for number, (name, config) in enumerate(configs.items()):
            running[name] = LoopProcess(name, config, folder / str(number), plan.deadline)
            request(running[name], train=0)  # one after the other warms up
        for _ in range(plan.rounds):
            for name, loop in list(running.items()):
                if answer := request(loop, train=plan.steps):
                    rates[name].append(plan.steps * plan.batch / answer["seconds"])
        for name, loop in list(running.items()):
            if answer := request(loop, summary=1):
                found["loops"][name] = {"images_per_s": rates[name]} | answer
        # Last, as profiling takes memory.
        if (profiled := running.get(plan.profiled)) is not None:
            _profile(profiled, plan, found)
    finally:
        for loop in running.values():
            loop.close()


def _profile(loop: LoopProcess, plan: Plan, found: dict[str, Any]) -> None:
    """Profile a loop's steps; its rates stay if that fails."""
    timed = plan.rounds * plan.steps
    try:
        if plan.with_parts:
            found["parts"] = loop.request(parts=min(8, timed))
        found["profile"] = loop.request(profile=min(3, timed))
    except LoopError as error:
        found["loops"][loop.name]["not_inspected"] = str(error)


def failures(loops: dict[str, Any]) -> Iterable[tuple[str, str]]:
    """Yield name and reason, in one line, of each loop that failed."""
    for name, loop in loops.items():
        if "failed" in loop:
            yield name, loop["failed"].strip().splitlines()[-1][:200]
