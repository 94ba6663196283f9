"""Killed, or asked to stop, at any moment."""

from __future__ import annotations

import signal
from random import Random

from tests.drills.disturb import at_random
from tests.drills.lab import Fault, Lab, Outcome


def kill(lab: Lab, random: Random, number: int) -> Outcome:
    run = lab.new()
    running = lab.start(lab.words(run))
    began = at_random(running, signal.SIGKILL, random, lab.seconds)
    killed = lab.end(running)
    lab.expect(killed.code in (-signal.SIGKILL, 0), f"killed, it ended with {killed.code}")
    return lab.look_and_continue(run, began=began)


def stop(lab: Lab, random: Random, number: int) -> Outcome:
    run = lab.new()
    running = lab.start(lab.words(run))
    began = at_random(running, signal.SIGTERM, random, lab.seconds)
    stopped = lab.end(running)
    unheard = stopped.code == -signal.SIGTERM and not run.exists()  # the script had not begun
    lab.expect(stopped.code in (75, 0) or unheard, f"asked to stop, it ended with {stopped.code}")
    outcome = lab.look_and_continue(run, began=began)
    lab.expect(outcome.images_lost == 0, f"{outcome.images_lost} images are lost")
    return outcome


FAULTS = (
    Fault("SIGKILL at a random moment", "continues to the same bytes", 6, 50, kill),
    Fault("SIGTERM at a random moment", "exit code 75, nothing lost, same bytes", 6, 50, stop),
)
