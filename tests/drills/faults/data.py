"""Shards on a file system that is slow or hangs."""

from __future__ import annotations

import time
from random import Random

from tests.drills.disturb import alive
from tests.drills.lab import BrokenPromise, Fault, Lab, Outcome
from tests.drills.run_contents import num_logged
from tests.drills.slow_files import slow_files

TIMEOUT_S = 6.0
GRACE_S = 30.0
"""Time allowed in addition to the time-out: for the start, and until the watchdog notices."""


def slow(lab: Lab, random: Random, number: int) -> Outcome:
    """Train from shards whose pages are read slowly."""
    run = lab.new()
    with slow_files(lab.shards, lab.new("mount"), random.uniform(0.001, 0.005)) as files:
        began = time.monotonic()
        done = lab.run(run, f"--data.shards={files.mount}")
        lab.expect(done.code == 0, f"it ended with {done.code}")
        lab.expect_same(run)
        lab.check_run(run)
        return Outcome(0, time.monotonic() - began, f"{files.reads} reads")


def hanging(lab: Lab, random: Random, number: int) -> Outcome:
    """Make reads hang from some step on: the run must end within its time-out, and continue."""
    run = lab.new()
    step = random.randrange(1, 12)
    with slow_files(lab.shards, lab.new("mount"), 0.0005) as files:
        limit = f"--train.timeout_minutes={TIMEOUT_S / 60}"
        running = lab.start(lab.words(run, f"--data.shards={files.mount}", limit))
        while alive(running.pids[0]) and num_logged(run) < step:
            time.sleep(0.001)
        files.hanging.set()
        began = time.monotonic()
        ended = lab.end(running, TIMEOUT_S + GRACE_S)
        seconds = time.monotonic() - began
    if ended.code in (0, 2):
        raise BrokenPromise(f"it ended with {ended.code}: {ended.stderr[-500:]}")
    outcome = lab.check_and_continue(run)
    return Outcome(outcome.images_lost, seconds)


FAULTS = (
    Fault("slow file system under the shards", "same bytes", 1, 5, slow),
    Fault(
        "hanging file system under the shards",
        "ends within train.timeout_minutes, then same bytes",
        1,
        5,
        hanging,
    ),
)
