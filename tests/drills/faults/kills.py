"""SIGKILL and stop requests at random moments, and SIGKILL within a save."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from random import Random

from tests.drills.disturb import as_soon_as, at_random
from tests.drills.lab import SAVE_EVERY, Fault, Lab, Outcome
from tests.support.tiny import BATCH

NUM_FILES = 5  # per checkpoint


def kill(lab: Lab, random: Random, number: int) -> Outcome:
    run = lab.new()
    running = lab.start(lab.words(run))
    began = at_random(running, signal.SIGKILL, random, lab.seconds)
    killed = lab.end(running)
    lab.expect(killed.code in (-signal.SIGKILL, 0), f"killed, it ended with {killed.code}")
    return lab.check_and_continue(run, began=began)


def request_stop(signum: int) -> Callable[[Lab, Random, int], Outcome]:
    """Return an attempt that requests a stop by a signal."""

    def attempt(lab: Lab, random: Random, number: int) -> Outcome:
        run = lab.new()
        running = lab.start(lab.words(run))
        began = at_random(running, signum, random, lab.seconds)
        stopped = lab.end(running)
        unhandled = stopped.code == -signum and not run.exists()  # the script had not begun
        lab.expect(stopped.code in (75, 0) or unhandled, f"it ended with {stopped.code}")
        outcome = lab.check_and_continue(run, began=began)
        lab.expect(outcome.images_lost == 0, f"{outcome.images_lost} images are lost")
        return outcome

    return attempt


def kill_after_file(lab: Lab, random: Random, number: int) -> Outcome:
    """Kill when 1 to 5 files of the second or a later save have been written."""
    file = number % NUM_FILES + 1
    run = lab.new()
    saves = random.randrange(1, 5)
    killed = lab.run(run, moment=f"file:{NUM_FILES * saves + file}")
    began = time.monotonic()
    lab.expect(killed.code == -signal.SIGKILL, f"it was not killed: {killed.code}")
    partial = [path for path in (run / "checkpoints").iterdir() if path.name.startswith(".")]
    lab.expect(len(partial) == 1, f"not within a save: {partial}")
    lab.expect(len(list(partial[0].iterdir())) == file, "not at this file")
    return lab.check_and_continue(run, began=began)


def kill_as_file_appears(lab: Lab, random: Random, number: int) -> Outcome:
    """Kill as soon as 1 to 5 files of a save exist, perhaps partially written."""
    count = number % NUM_FILES + 1
    run = lab.new()
    running = lab.start(lab.words(run))
    name = f"{random.randrange(1, 6) * SAVE_EVERY * BATCH:09d}"
    folder = run / "checkpoints"

    def have_appeared() -> bool:
        try:
            return any(len(list(path.iterdir())) >= count for path in folder.glob(f"*{name}"))
        except FileNotFoundError:  # it got its final name meanwhile
            return True

    began = as_soon_as(running, signal.SIGKILL, have_appeared) or time.monotonic()
    killed = lab.end(running)
    lab.expect(killed.code == -signal.SIGKILL, f"it was not killed: {killed.code}")
    return lab.check_and_continue(run, began=began)


_LOSSLESS = "exit code 75, nothing lost, same bytes"
_SAME = "continues to the same bytes"
FAULTS = (
    Fault("SIGKILL at a random moment", _SAME, 6, 50, kill),
    Fault("SIGTERM at a random moment", _LOSSLESS, 6, 50, request_stop(signal.SIGTERM)),
    Fault("SIGHUP at a random moment", _LOSSLESS, 4, 30, request_stop(signal.SIGHUP)),
    Fault("SIGKILL after each file of a save", _SAME, 5, 20, kill_after_file),
    Fault("SIGKILL as a file of a save appears", _SAME, 5, 20, kill_as_file_appears),
)
