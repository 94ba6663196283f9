"""A loss that is no number, and memory that does not suffice."""

from __future__ import annotations

import time
from random import Random

from tests.drills.disturb import go_on, leave_memory, until_stopped
from tests.drills.lab import SIGNAL_AT, STEPS, Fault, Lab, Outcome, named_checkpoints
from tests.support.tiny import BATCH


def not_finite(lab: Lab, random: Random, number: int) -> Outcome:
    """Make the loss of a step no number: named, and nothing saved of it."""
    run = lab.new()
    step = random.randrange(STEPS)
    began = time.monotonic()
    ended = lab.run(run, moment=f"nan:{step + 1}")
    lab.expect_mistake(ended, f"not finite at step {step} ")
    lab.expect("whole" in ended.stderr, ended.stderr)
    seen = [int(path.name) for path in named_checkpoints(run)]
    lab.expect(max(seen, default=0) <= step * BATCH, f"after step {step}: checkpoints {seen}")
    outcome = lab.look_and_continue(run)
    return Outcome(outcome.images_lost, time.monotonic() - began)


def no_memory(lab: Lab, random: Random, number: int) -> Outcome:
    """Take memory away before the first step of a run with a batch that needs it."""
    run = lab.new()
    large = ("--train.global_batch=4096", "--train.total_images=8192", "--data.shards")
    words = lab.words(run, *large, str(lab.shards))
    running = lab.start([SIGNAL_AT, "forward:1=STOP", *words])
    lab.expect(until_stopped(running), "the moment never came")
    leave_memory(running.pids[0], 64)
    began = go_on(running)
    ended = lab.end(running)
    lab.expect_mistake(ended, "do not fit into the memory")
    lab.look(run)
    lab.expect(not named_checkpoints(run), "a checkpoint is there")
    return Outcome(0, time.monotonic() - began)


FAULTS = (
    Fault("loss is not finite", "step named, nothing saved of it, same bytes", 3, 20, not_finite),
    Fault("out of memory", "one line, nothing partial", 1, 5, no_memory),
)
