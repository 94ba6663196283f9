"""Killing the submission of a sweep to this machine at several points."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import psutil
import yaml

from dgm.training.checkpoint import find_fault
from tests.drills.lab import PATIENCE_S, STEPS, BrokenPromise, Fault, Lab, Outcome
from tests.support.tiny import BATCH, LAUNCH, TINY

LR = TINY["diffusion"]["optim"]["lr"]  # so that the first set is the undisturbed run
SETS = {"first": {"optim.lr": LR}, "second": {"optim.lr": LR / 2}}


def appears(base: Path, pattern: str) -> Callable[[], bool]:
    return lambda: any(base.glob(pattern))


POINTS = (
    "slurm/*/configs/second.yaml",  # everything is written, nothing started
    "first/slurm/job.json",  # the first was started
    "slurm/*/code/launch",  # code is being copied
    "first/config.yaml",  # the first trains
    "slurm/*",
    "second/slurm/job.json",
    "first/checkpoints/*/manifest.json",
    "slurm/*/configs/first.json",
)


class Submitter:
    """`python -m slurm.submit` of the sweep, as a user starts it."""

    def __init__(self, lab: Lab, base: Path):
        self.lab, self.base = lab, base
        sweep = lab.folder / "sweep.yaml"
        sweep.write_text(yaml.safe_dump({"sets": SETS}))
        script = LAUNCH / "train_ddpm.py"
        options: list[object] = ["--cluster", "local", "--max-parallel", "2", "--sweep", sweep]
        options += ["--accelerate-config", LAUNCH.parent / "accelerate_config.yaml"]
        words = [script, "--config", lab.config, *options, "--", "--run.dir", base]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "slurm.submit", *map(str, words)],
            env={**lab.environment, "PYTHONPATH": str(LAUNCH.parent)},
            cwd=lab.elsewhere,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        lab.running[self.process] = time.monotonic()  # so that the lab kills it at the end

    def kill_when(self, condition: Callable[[], bool]) -> float:
        """Kill this process, not its jobs, as soon as a condition holds; return when."""
        while self.process.poll() is None and not condition():
            time.sleep(0.001)
        self.process.kill()
        self.process.wait()
        del self.lab.running[self.process]
        return time.monotonic()

    def end(self) -> int:
        """Wait for the end of the submission; return its exit code."""
        try:
            self.lab.output, _ = self.process.communicate(timeout=PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise BrokenPromise(f"submitting hangs: no end within {PATIENCE_S:.0f} s") from None
        finally:
            del self.lab.running[self.process]
        return self.process.returncode


def wait_for_orphans(base: Path) -> None:
    """Wait until the jobs of a killed submission have ended."""
    began = time.monotonic()
    while time.monotonic() - began < PATIENCE_S:
        lines = (process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"]))
        if not any(str(base) in word for line in lines for word in line):
            return
        time.sleep(0.1)
    raise BrokenPromise("jobs hang after their submission was killed")


def kill(lab: Lab, random: Random, number: int) -> Outcome:
    """Kill the submission at some point; the same command must then complete the sweep."""
    base = lab.new("sweep")
    began = Submitter(lab, base).kill_when(appears(base, POINTS[number % len(POINTS)]))
    wait_for_orphans(base)
    seconds = time.monotonic() - began
    for name in SETS:
        lab.check_run(base / name)
    for path in base.rglob("job.json"):
        json.loads(path.read_text())
    code = Submitter(lab, base).end()
    lab.expect(code == 0, f"submitting again ended with {code}")
    lab.expect_same(base / "first")
    last = base / "second" / "checkpoints" / f"{STEPS * BATCH:09d}"
    lab.expect(find_fault(last) is None, f"{last}: {find_fault(last)}")
    return Outcome(0, seconds)


FAULTS = (
    Fault(
        "SIGKILL in a sweep's submission", "the same command does it all, same bytes", 1, 8, kill
    ),
)
