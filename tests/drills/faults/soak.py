"""Ten thousand steps: memory, open files and threads stay flat."""

from __future__ import annotations

import contextlib
import time
from random import Random

import psutil

from tests.drills.disturb import alive
from tests.drills.lab import Fault, Lab, Outcome
from tests.drills.run_contents import num_logged
from tests.support.tiny import BATCH

STEPS = 10_000
NUM_LOGS = 100
PATIENCE_S = 1800.0
MAX_GROWTH = 1.02
"""Maximum ratio of resident memory in the last tenth of the run to that in the second."""


Usage = tuple[float, int, int]
"""Resident memory in MiB, number of open files, number of threads."""


def soak(lab: Lab, random: Random, number: int) -> Outcome:
    """Compare resource usage in the second and the last tenth of a run, by the minimum of each."""
    run = lab.new()
    every = STEPS // NUM_LOGS * BATCH
    cadence = [f"--train.{name}_every_images={every}" for name in ("log", "save", "sample")]
    running = lab.start(lab.words(run, f"--train.total_images={STEPS * BATCH}", *cadence))
    began = time.monotonic()
    samples: list[tuple[int, Usage]] = []
    process = psutil.Process(running.pids[0])
    while alive(process.pid) and time.monotonic() - began < PATIENCE_S:
        logged = num_logged(run)
        with contextlib.suppress(psutil.NoSuchProcess):
            mib = process.memory_info().rss / 2**20
            samples.append((logged, (mib, process.num_fds(), process.num_threads())))
        time.sleep(0.1)
    done = lab.end(running)
    lab.expect(done.code == 0, f"it ended with {done.code}")
    lab.check_run(run)
    tenth = NUM_LOGS // 10
    early = minima(samples, tenth, 2 * tenth)
    late = minima(samples, NUM_LOGS - tenth, NUM_LOGS)
    note = ", ".join(
        f"{name} {a:.0f} and {b:.0f}"
        for name, a, b in zip(("MiB", "open files", "threads"), early, late, strict=True)
    )
    lab.expect(late[0] <= early[0] * MAX_GROWTH, f"memory grows: {note}")
    lab.expect(
        all(b <= a for a, b in zip(early[1:], late[1:], strict=True)),
        f"open files or threads grow: {note}",
    )
    return Outcome(0, lab.took_s, f"in its second and its last tenth: {note}")


def minima(samples: list[tuple[int, Usage]], first: int, last: int) -> Usage:
    """Return the minimum of each number between two log lines, as saves open files for a while."""
    mib, files, threads = zip(*(n for logged, n in samples if first <= logged < last), strict=True)
    return min(mib), min(files), min(threads)


FAULTS = (Fault("10,000 steps", "memory, open files and threads stay flat", 0, 1, soak),)
