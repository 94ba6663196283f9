"""Two processes on one run folder, and one of two ranks that dies or hangs."""

from __future__ import annotations

import signal
import time
from random import Random

from tests.drills.disturb import alive, resume_process, send, until_stopped
from tests.drills.faults.data import GRACE_S, TIMEOUT_S
from tests.drills.lab import SIGNAL_AT, Fault, Lab, Outcome
from tests.drills.run_contents import num_logged

LIMIT = f"--train.timeout_minutes={TIMEOUT_S / 60}"


def second_process(lab: Lab, random: Random, number: int) -> Outcome:
    """Start the same command while a run is stopped: it must end and name the first process."""
    run = lab.new()
    step = random.randrange(1, 12)
    first = lab.start([SIGNAL_AT, f"forward:{step}=STOP", *lab.words(run)])
    lab.expect(until_stopped(first), "the moment never came")
    before = num_logged(run)
    began = time.monotonic()
    second = lab.run(run)
    seconds = time.monotonic() - began
    lab.expect_mistake(second, str(run), str(first.pids[0]))
    lab.expect(num_logged(run) == before, "the second wrote to the log")
    resume_process(first)
    done = lab.end(first)
    lab.expect(done.code == 0, f"the first ended with {done.code}")
    lab.expect_same(run)
    return Outcome(0, seconds)


def at_once(lab: Lab, random: Random, number: int) -> Outcome:
    """Start two processes at once: one must train, the other end with exit code 2."""
    run = lab.new()
    both = [lab.start(lab.words(run)) for _ in range(2)]
    ended = sorted((lab.end(each) for each in both), key=lambda result: result.code)
    lab.expect([r.code for r in ended] == [0, 2], f"exit codes {[r.code for r in ended]}")
    lab.expect_mistake(ended[1], str(run))
    lab.expect_same(run)
    lab.check_run(run)
    return Outcome(0, lab.took_s)


def dead_rank(lab: Lab, random: Random, number: int) -> Outcome:
    """Kill one of two processes, without a launcher that would notice."""
    rank = number % 2
    lab.undisturbed_run(2)
    run = lab.new()
    running = lab.start(lab.words(run, LIMIT), processes=2, terminate_others=False)
    while num_logged(run) < 1 and alive(running.pids[rank]):
        time.sleep(0.002)
    time.sleep(random.uniform(0, 0.3))
    began = send(running, signal.SIGKILL, rank)
    ended = lab.end(running, TIMEOUT_S + GRACE_S)
    seconds = time.monotonic() - began
    other = ended.codes[1 - rank]
    lab.expect(ended.codes[rank] == -signal.SIGKILL or ended.code == 0, f"codes {ended.codes}")
    lab.expect(other != 2, f"the other ended with {other}")
    outcome = lab.check_and_continue(run, LIMIT, processes=2)
    return Outcome(outcome.images_lost, seconds)


def hanging_rank(lab: Lab, random: Random, number: int) -> Outcome:
    """Stop one of two processes: the other must end within the time-out."""
    rank = number % 2
    lab.undisturbed_run(2)
    run = lab.new()
    moment = f"forward:{random.randrange(2, 20)}=STOP@{rank}"
    words = [SIGNAL_AT, moment, *lab.words(run, LIMIT)]
    running = lab.start(words, processes=2, terminate_others=False)
    lab.expect(until_stopped(running, rank), "the moment never came")
    began = time.monotonic()
    while alive(running.pids[1 - rank]) and time.monotonic() - began < TIMEOUT_S + GRACE_S:
        time.sleep(0.05)
    seconds = time.monotonic() - began
    hangs = alive(running.pids[1 - rank])
    for each in (0, 1):
        send(running, signal.SIGKILL, each)
    lab.end(running)
    lab.expect(not hangs, f"the other still waits after {seconds:.0f} s")
    outcome = lab.check_and_continue(run, LIMIT, processes=2)
    return Outcome(outcome.images_lost, seconds)


_ENDS = "the other ends within the time-out, then same bytes"
FAULTS = (
    Fault(
        "a second process on the same run",
        "ends with 2, the first one is named",
        2,
        10,
        second_process,
    ),
    Fault("two processes at once on a new run", "one trains, same bytes", 2, 10, at_once),
    Fault("one of two ranks dies", _ENDS, 1, 6, dead_rank),
    Fault("one of two ranks hangs", _ENDS, 1, 4, hanging_rank),
)
