"""A loss that is not finite, and too little memory."""

from __future__ import annotations

import signal
import time
from random import Random

from tests.drills.disturb import as_soon_as, limit_memory, resume_process, until_stopped
from tests.drills.lab import STEPS, Fault, Lab, Outcome
from tests.drills.run_contents import named_checkpoints
from tests.support.tiny import BATCH


def not_finite(lab: Lab, random: Random, number: int) -> Outcome:
    """Make the loss of a step NaN: the step must be named, and nothing of it saved."""
    run = lab.new()
    step = random.randrange(STEPS)
    began = time.monotonic()
    ended = lab.run(run, moment=f"nan:{step + 1}")
    lab.expect_mistake(ended, f"not finite at step {step} ")
    lab.expect("are intact" in ended.stderr, ended.stderr)
    saved = [int(path.name) for path in named_checkpoints(run)]
    lab.expect(max(saved, default=0) <= step * BATCH, f"after step {step}: checkpoints {saved}")
    outcome = lab.check_and_continue(run)
    return Outcome(outcome.images_lost, time.monotonic() - began)


def no_memory(lab: Lab, random: Random, number: int) -> Outcome:
    """Leave a run less memory than its batch needs: one line, and it runs with more memory."""
    run = lab.new()
    large = ("--train.global_batch=2048", "--train.total_images=4096")
    running = lab.start(lab.words(run, *large))
    stopped = as_soon_as(running, signal.SIGSTOP, (run / "environment.json").exists)
    lab.expect(stopped is not None and until_stopped(running), "the moment never came")
    megabytes = random.randrange(150)  # the batch needs about 350
    limit_memory(running.pids[0], megabytes)
    began = resume_process(running)
    ended = lab.end(running)
    seconds = time.monotonic() - began
    lab.expect_mistake(ended, "do not fit into the memory")
    lab.check_run(run)
    again = lab.run(run, *large)
    lab.expect(again.code == 0, f"with memory, it ended with {again.code}")
    lab.check_run(run)
    return Outcome(0, seconds)


FAULTS = (
    Fault("loss is not finite", "step named, nothing saved of it, same bytes", 3, 20, not_finite),
    Fault("out of memory", "one line, nothing partial, then it runs", 1, 5, no_memory),
)
