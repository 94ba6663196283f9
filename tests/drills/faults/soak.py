"""Ten thousand steps: memory, open files and threads stay flat."""

from __future__ import annotations

import contextlib
import time
from random import Random

import psutil

from tests.drills.disturb import alive
from tests.drills.lab import Fault, Lab, Outcome
from tests.drills.left import num_logged
from tests.support.tiny import BATCH

STEPS = 10_000
LOGS = 100
PATIENCE_S = 1800.0
FLAT = 1.02
"""Resident memory at the end over that after a tenth."""


def soak(lab: Lab, random: Random, number: int) -> Outcome:
    """Measure after a tenth and at the end."""
    run = lab.new()
    every = STEPS // LOGS * BATCH
    cadence = [f"--train.{name}_every_images={every}" for name in ("log", "save", "sample")]
    running = lab.start(lab.words(run, f"--train.total_images={STEPS * BATCH}", *cadence))
    began = time.monotonic()
    seen: dict[int, tuple[int, int, int]] = {}
    process = psutil.Process(running.pids[0])
    while alive(process.pid) and time.monotonic() - began < PATIENCE_S:
        logged = num_logged(run)
        with contextlib.suppress(psutil.NoSuchProcess):
            numbers = process.memory_info().rss, process.num_fds(), process.num_threads()
            seen.setdefault(logged, numbers)
        time.sleep(0.2)
    done = lab.end(running)
    lab.expect(done.code == 0, f"it ended with {done.code}")
    lab.look(run)
    early = next(numbers for logs, numbers in seen.items() if logs >= LOGS // 10)
    late = next(numbers for logs, numbers in reversed(seen.items()) if logs < LOGS)
    note = "; ".join(
        f"{name} {a:.1f} and {b:.1f}"
        for name, a, b in zip(
            ("MiB", "open files", "threads"), in_mib(early), in_mib(late), strict=True
        )
    )
    lab.expect(late[0] <= early[0] * FLAT, f"memory grows: {note}")
    lab.expect(late[1:] <= early[1:], f"open files or threads grow: {note}")
    return Outcome(0, time.monotonic() - began, f"after a tenth and at the end: {note}")


def in_mib(numbers: tuple[int, int, int]) -> tuple[float, int, int]:
    return numbers[0] / 2**20, *numbers[1:]


FAULTS = (Fault("10,000 steps", "memory, open files and threads stay flat", 0, 1, soak),)
