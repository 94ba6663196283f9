"""SIGKILL while a sweep is submitted with --cluster local."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import psutil
import yaml

from dgm.training.checkpoint import find_fault
from tests.drills.lab import PATIENCE_S, STEPS, Fault, Lab, Outcome
from tests.support.tiny import BATCH, LAUNCH, TINY

LR = TINY["diffusion"]["optim"]["lr"]  # so that the first set is the undisturbed run
SETS = {"first": {"optim.lr": LR}, "second": {"optim.lr": LR / 2}}
# The submission is killed when a file appears.
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


def submit(lab: Lab, base: Path) -> subprocess.Popen:
    """Start `python -m slurm.submit` of the sweep."""
    sweep = lab.folder / "sweep.yaml"
    sweep.write_text(yaml.safe_dump({"sets": SETS}))
    words: list[object] = [LAUNCH / "train_ddpm.py", "--config", lab.config, "--cluster", "local"]
    words += ["--max-parallel", "2", "--sweep", sweep]
    words += ["--accelerate-config", LAUNCH.parent / "accelerate_config.yaml"]
    process = subprocess.Popen(
        [sys.executable, "-m", "slurm.submit", *map(str, words), "--", "--run.dir", str(base)],
        env=lab.environment,
        cwd=lab.elsewhere,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lab.running[process] = time.monotonic()
    return process


def wait_for_jobs(base: Path) -> None:
    """Wait for the jobs that outlive a killed submission."""
    began = time.monotonic()
    while time.monotonic() - began < PATIENCE_S:
        lines = (process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"]))
        if not any(str(base) in word for line in lines for word in line):
            return
        time.sleep(0.1)
    raise AssertionError("the jobs of a killed submission hang")


def kill(lab: Lab, random: Random, number: int) -> Outcome:
    """Kill the submission at a point; the same command then completes it."""
    base = lab.new("sweep")
    killed = submit(lab, base)
    while killed.poll() is None and not any(base.glob(POINTS[number % len(POINTS)])):
        time.sleep(0.001)
    lab.clear()
    killed.wait()
    began = time.monotonic()
    wait_for_jobs(base)
    seconds = time.monotonic() - began
    for name in SETS:
        lab.check_run(base / name)
    for path in base.rglob("job.json"):
        json.loads(path.read_text())
    again = submit(lab, base)
    lab.output, _ = again.communicate(timeout=PATIENCE_S)
    del lab.running[again]
    assert again.returncode == 0, f"submitting again ended with {again.returncode}"
    lab.check_same(base / "first")
    last = base / "second" / "checkpoints" / f"{STEPS * BATCH:09d}"
    assert find_fault(last) is None, f"{last}: {find_fault(last)}"
    return Outcome(0, seconds)


_SAME = "the same command does it all, same bytes"
FAULTS = (Fault("SIGKILL in a sweep's submission", _SAME, 1, 8, kill),)
