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
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgm.benchmarks.processes import ROOT, kill_tree
from dgm.common.errors import UserError
from dgm.common.exit_codes import MISTAKE


class LoopError(RuntimeError):
    """A loop ended by itself, or did not answer in time."""


@dataclass(frozen=True)
class Plan:
    """How loops are timed."""

    rounds: int
    steps: int  # per turn
    batch: int
    deadline: float  # by time.monotonic()
    sequential: bool  # on a GPU
    profiled: str  # the loop of ours whose steps are profiled, if it is timed


class LoopProcess:
    """A loop in a process of its own."""

    def __init__(self, config: dict[str, Any], parent: Path, deadline: float):
        folder = tempfile.mkdtemp(dir=parent)
        self.log, self.deadline = Path(folder, "log.txt"), deadline
        settings = json.dumps({**config, "folder": folder})
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "dgm.benchmarks.loops", settings], cwd=ROOT, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=output,
            )  # fmt: skip

    def request(self, **request: int) -> dict[str, Any]:
        """Send a request and return the answer, the first one after the loop's warm-up.

        Raise LoopError, or UserError if the loop ended by a user's mistake.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, as is reported below
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
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
        """Kill the process and all that it started, such as compilers and loader workers."""
        kill_tree(self.process)
        self.process.communicate()


def time_loops(configs: dict[str, dict[str, Any]], plan: Plan, folder: Path) -> dict[str, Any]:
    """Return `loops`, {name: results or why it failed}, and `parts` and `profile` of one of them.

    Raise UserError if the first loop ended by a user's mistake, LoopError if all failed.
    """
    found: dict[str, Any] = {"loops": {}, "parts": {}, "profile": {}}
    for names in [[name] for name in configs] if plan.sequential else [list(configs)]:
        _time_group({name: configs[name] for name in names}, plan, folder, found)
    loops = found["loops"] = {name: found["loops"][name] for name in configs}
    if all("failed" in loop for loop in loops.values()):
        reasons = (f"the loop {name}: {loop['failed']}" for name, loop in loops.items())
        raise LoopError("\n".join(reasons))
    return found


def _time_group(
    configs: dict[str, dict[str, Any]], plan: Plan, folder: Path, found: dict[str, Any]
) -> None:
    """Time loops in turns; one that fails is dropped."""
    rates: dict[str, list[float]] = {name: [] for name in configs}
    running: dict[str, LoopProcess] = {}

    def request(name: str, **request: int) -> dict[str, Any] | None:
        try:
            return running[name].request(**request)
        except (LoopError, UserError) as error:
            if isinstance(error, UserError) and not found["loops"]:
                raise
            found["loops"][name] = {"failed": str(error), "images_per_s": rates[name]}
            running.pop(name).close()
            return None

    try:
        for name, config in configs.items():
            running[name] = LoopProcess(config, folder, plan.deadline)
            request(name, train=0)  # warms up, one loop at a time
        for _ in range(plan.rounds):
            for name in list(running):
                if answer := request(name, train=plan.steps):
                    rates[name].append(plan.steps * plan.batch / answer["seconds"])
        for name in list(running):
            if answer := request(name, summary=1):
                found["loops"][name] = {"images_per_s": rates[name]} | answer
        if loop := running.get(plan.profiled):  # last, as it takes memory
            try:
                found |= loop.request(profile=min(3, plan.rounds * plan.steps))
            except LoopError as error:  # the rates measured so far stay
                found["loops"][plan.profiled]["not_inspected"] = str(error)
    finally:
        for loop in running.values():
            loop.close()


def failures(loops: dict[str, Any]) -> Iterable[tuple[str, str]]:
    """Yield name and reason, in one line, of each loop that failed."""
    for name, loop in loops.items():
        if "failed" in loop:
            yield name, loop["failed"].strip().splitlines()[-1][:200]
