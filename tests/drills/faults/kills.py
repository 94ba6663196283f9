"""SIGKILL and requests to stop at random moments, SIGKILL within a save, and two processes."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from random import Random

from tests.drills.lab import SAVE_EVERY, Fault, Lab, Outcome, send, send_when
from tests.support.tiny import BATCH

NUM_FILES = 5  # of a checkpoint


def kill(lab: Lab, random: Random, number: int) -> Outcome:
    run = lab.new()
    running = lab.start(lab.words(run))
    time.sleep(random.uniform(0, lab.seconds))
    began = send(running, signal.SIGKILL)
    killed = lab.end(running)
    assert killed.code in (-signal.SIGKILL, 0), f"killed, it ended with {killed.code}"
    return lab.check_and_resume(run, began=began)


def request_stop(signum: int) -> Callable[[Lab, Random, int], Outcome]:
    """Return an attempt that requests a stop by a signal."""

    def attempt(lab: Lab, random: Random, number: int) -> Outcome:
        run = lab.new()
        running = lab.start(lab.words(run))
        time.sleep(random.uniform(0, lab.seconds))
        began = send(running, signum)
        stopped = lab.end(running)
        unhandled = stopped.code == -signum and not run.exists()  # before the script began
        assert stopped.code in (75, 0) or unhandled, f"it ended with {stopped.code}"
        outcome = lab.check_and_resume(run, began=began)
        assert outcome.images_repeated == 0, f"{outcome.images_repeated} images are repeated"
        return outcome

    return attempt


def kill_as_file_appears(lab: Lab, random: Random, number: int) -> Outcome:
    """Kill as soon as so many files of a save exist: they may be incomplete."""
    count = number % NUM_FILES + 1
    run = lab.new()
    running = lab.start(lab.words(run))
    name = f"{random.randrange(1, 6) * SAVE_EVERY * BATCH:09d}"

    def exist() -> bool:
        try:
            folders = (run / "checkpoints").glob(f"*{name}")
            return any(len(list(path.iterdir())) >= count for path in folders)
        except FileNotFoundError:  # it was renamed meanwhile
            return True

    began = send_when(running, signal.SIGKILL, exist)
    killed = lab.end(running)
    assert killed.code == -signal.SIGKILL, f"it was not killed: {killed.code}"
    return lab.check_and_resume(run, began=began)


def two_at_once(lab: Lab, random: Random, number: int) -> Outcome:
    """Start two processes at once: one trains, the other ends with exit code 2."""
    run = lab.new()
    both = [lab.start(lab.words(run)) for _ in range(2)]
    ended = sorted((lab.end(each) for each in both), key=lambda result: result.code)
    assert [r.code for r in ended] == [0, 2], f"exit codes {[r.code for r in ended]}"
    lab.check_mistake(ended[1], str(run))
    lab.check_same(run)
    lab.check_run(run)
    return Outcome(seconds=lab.took_s)


_LOSSLESS = "exit code 75, nothing lost, same bytes"
_SAME = "continues to the same bytes"
FAULTS = (
    Fault("SIGKILL at a random moment", _SAME, 6, 50, kill),
    Fault("SIGTERM at a random moment", _LOSSLESS, 6, 50, request_stop(signal.SIGTERM)),
    Fault("SIGHUP at a random moment", _LOSSLESS, 4, 30, request_stop(signal.SIGHUP)),
    Fault("SIGKILL as a file of a save appears", _SAME, 5, 20, kill_as_file_appears),
    Fault("two processes at once on a new run", "one trains, same bytes", 2, 10, two_at_once),
)
