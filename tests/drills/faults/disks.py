"""A disk that is full or read-only during a save, a log or a build."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from random import Random

from tests.drills import disturb
from tests.drills.disturb import as_soon_as, resume_process, small_disk, until_stopped
from tests.drills.faults import builds
from tests.drills.lab import SIGNAL_AT, Fault, Lab, Outcome

Broken = Callable[[Path, Random], AbstractContextManager[None]]
"""Makes a disk unusable while the context is active."""


@contextmanager
def full(disk: Path, random: Random) -> Iterator[None]:
    filler = disturb.fill(disk, leave=random.randrange(16_384))
    yield
    filler.unlink()


@contextmanager
def read_only(disk: Path, random: Random) -> Iterator[None]:
    with disturb.read_only(disk):
        yield


def train(lab: Lab, random: Random, moment: str, broken: Broken) -> Outcome:
    """Break the disk at a moment of a run, which ends with one line and later continues."""
    with small_disk(lab.new("disk"), 32) as disk:
        run = disk / "run"
        running = lab.start([SIGNAL_AT, f"{moment}=STOP", *lab.words(run)])
        lab.expect(until_stopped(running), "the moment never came")
        with broken(disk, random):
            began = resume_process(running)
            ended = lab.end(running)
            seconds = time.monotonic() - began
            lab.expect_mistake(ended, str(run))
            lab.check_run(run)
        outcome = lab.check_and_continue(run)
        return Outcome(outcome.images_lost, seconds)


def save(broken: Broken) -> Callable[[Lab, Random, int], Outcome]:
    def attempt(lab: Lab, random: Random, number: int) -> Outcome:
        file = 6 + number % 5  # a file of the second save
        return train(lab, random, f"file:{file}", broken)

    return attempt


def log(broken: Broken) -> Callable[[Lab, Random, int], Outcome]:
    def attempt(lab: Lab, random: Random, number: int) -> Outcome:
        return train(lab, random, f"forward:{random.choice((6, 7, 9, 10, 11))}", broken)

    return attempt


def build(broken: Broken) -> Callable[[Lab, Random, int], Outcome]:
    def attempt(lab: Lab, random: Random, number: int) -> Outcome:
        builds.undisturbed(lab)
        with small_disk(lab.new("disk"), 8) as disk:
            out = disk / "shards"
            running = lab.start(builds.build_command(lab, out))
            count = 1 + number % 7
            stopped = as_soon_as(running, signal.SIGSTOP, lambda: builds.num_files(out) >= count)
            lab.expect(stopped is not None and until_stopped(running), "the moment never came")
            with broken(disk, random):
                began = resume_process(running)
                ended = lab.end(running)
                seconds = time.monotonic() - began
                lab.expect_mistake(ended, str(out))
                lab.expect(not out.exists(), f"{out} exists")
            builds.check_and_build(lab, out, began)
            return Outcome(0, seconds)

    return attempt


_LINE = "one line, readable, then same bytes"
FAULTS = (
    Fault("disk full in a save", _LINE, 2, 10, save(full)),
    Fault("disk full in a log", _LINE, 1, 5, log(full)),
    Fault("disk full in a build", "one line, nothing left, then same bytes", 2, 10, build(full)),
    Fault("read-only folder in a save", _LINE, 2, 10, save(read_only)),
    Fault("read-only folder in a log", _LINE, 1, 5, log(read_only)),
    Fault("read-only folder in a build", "one line, then same bytes", 1, 7, build(read_only)),
)
