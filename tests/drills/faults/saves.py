"""Killed in the middle of a save, at each of its files."""

from __future__ import annotations

import signal
import time
from random import Random

from tests.drills.disturb import as_soon_as
from tests.drills.lab import SAVE_EVERY, Fault, Lab, Outcome
from tests.support.tiny import BATCH

NUM_FILES = 5


def kill_after_file(lab: Lab, random: Random, number: int) -> Outcome:
    """Kill when so many files of the second or a later save are on the disk."""
    file = number % NUM_FILES + 1
    run = lab.new()
    saves = random.randrange(1, 5)
    killed = lab.run(run, moment=f"file:{NUM_FILES * saves + file}")
    began = time.monotonic()
    lab.expect(killed.code == -signal.SIGKILL, f"it was not killed: {killed.code}")
    partial = [path for path in (run / "checkpoints").iterdir() if path.name.startswith(".")]
    lab.expect(len(partial) == 1, f"not within a save: {partial}")
    lab.expect(len(list(partial[0].iterdir())) == file, "not at this file")
    return lab.look_and_continue(run, began=began)


def kill_as_file_appears(lab: Lab, random: Random, number: int) -> Outcome:
    """Kill as soon as so many files of a save can be seen: they may be half-written."""
    count = number % NUM_FILES + 1
    run = lab.new()
    running = lab.start(lab.words(run))
    name = f"{random.randrange(1, 6) * SAVE_EVERY * BATCH:09d}"
    folder = run / "checkpoints"

    def seen() -> bool:
        try:
            return any(len(list(path.iterdir())) >= count for path in folder.glob(f"*{name}"))
        except FileNotFoundError:  # it got its final name meanwhile
            return True

    began = as_soon_as(running, signal.SIGKILL, seen) or time.monotonic()
    killed = lab.end(running)
    lab.expect(killed.code == -signal.SIGKILL, f"it was not killed: {killed.code}")
    return lab.look_and_continue(run, began=began)


FAULTS = (
    Fault(
        "SIGKILL after each file of a save", "continues to the same bytes", 5, 20, kill_after_file
    ),
    Fault(
        "SIGKILL as a file of a save appears",
        "continues to the same bytes",
        5,
        20,
        kill_as_file_appears,
    ),
)
