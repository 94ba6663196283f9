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
LOGS = 100
PATIENCE_S = 1800.0
FLAT = 1.02
"""Resident memory at the end over that after a tenth."""


Numbers = tuple[float, int, int]
"""MiB of resident memory, open files, threads."""


def soak(lab: Lab, random: Random, number: int) -> Outcome:
    """Compare the second tenth of a run with its last: the least that was seen of each."""
    run = lab.new()
    every = STEPS // LOGS * BATCH
    cadence = [f"--train.{name}_every_images={every}" for name in ("log", "save", "sample")]
    running = lab.start(lab.words(run, f"--train.total_images={STEPS * BATCH}", *cadence))
    began = time.monotonic()
    seen: list[tuple[int, Numbers]] = []
    process = psutil.Process(running.pids[0])
    while alive(process.pid) and time.monotonic() - began < PATIENCE_S:
        logged = num_logged(run)
        with contextlib.suppress(psutil.NoSuchProcess):
            mib = process.memory_info().rss / 2**20
            seen.append((logged, (mib, process.num_fds(), process.num_threads())))
        time.sleep(0.1)
    done = lab.end(running)
    lab.expect(done.code == 0, f"it ended with {done.code}")
    lab.check_run(run)
    early, late = least(seen, LOGS // 10, LOGS // 5), least(seen, LOGS - LOGS // 10, LOGS)
    note = ", ".join(
        f"{name} {a:.0f} and {b:.0f}"
        for name, a, b in zip(("MiB", "open files", "threads"), early, late, strict=True)
    )
    lab.expect(late[0] <= early[0] * FLAT, f"memory grows: {note}")
    lab.expect(
        all(b <= a for a, b in zip(early[1:], late[1:], strict=True)),
        f"open files or threads grow: {note}",
    )
    return Outcome(0, lab.took_s, f"in its second and its last tenth: {note}")


def least(seen: list[tuple[int, Numbers]], first: int, last: int) -> Numbers:
    """Return the minimum of each number over a range of logged lines: a save opens a file."""
    mib, files, threads = zip(*(n for logged, n in seen if first <= logged < last), strict=True)
    return min(mib), min(files), min(threads)


FAULTS = (Fault("10,000 steps", "memory, open files and threads stay flat", 0, 1, soak),)
