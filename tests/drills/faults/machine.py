"""Faults of the machine: disks, clock, memory, a loss that is not finite; and a long run."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from random import Random

import psutil
import pytest

from tests.drills.lab import (
    HERE,
    STEPS,
    Fault,
    Lab,
    Outcome,
    send,
    send_when,
    status_of,
    wait_until_stopped,
)
from tests.drills.run_contents import metrics, named_checkpoints
from tests.support.tiny import BATCH


@contextmanager
def mounted(folder: Path, *words: object) -> Iterator[None]:
    """Mount a file system for a while."""
    done = subprocess.run(["mount", *map(str, words), folder], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.xfail(f"mount: {done.stderr.strip()}")
    try:
        yield
    finally:  # lazily: a process that used it may not have ended completely
        subprocess.run(["umount", "--lazy", folder], check=True)


@contextmanager
def full(disk: Path, random: Random) -> Iterator[None]:
    """Fill a disk up to some bytes."""
    filler = disk / "filler"
    with open(filler, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError as error:
            assert error.errno == errno.ENOSPC
        os.ftruncate(file.fileno(), max(file.tell() - random.randrange(16_384), 0))
    yield
    filler.unlink()


@contextmanager
def read_only(disk: Path, random: Random) -> Iterator[None]:
    """Make a disk read-only, except for files that are open for writing already."""
    with mounted(disk, "--bind", disk):
        subprocess.run(["mount", "-o", "remount,bind,ro", disk], check=True)
        yield


def save(
    broken: Callable[[Path, Random], AbstractContextManager[None]],
) -> Callable[[Lab, Random, int], Outcome]:
    """Return an attempt that breaks the disk during the second save."""

    def attempt(lab: Lab, random: Random, number: int) -> Outcome:
        disk = lab.new("disk")
        disk.mkdir(parents=True)
        with mounted(disk, "-t", "tmpfs", "-o", "size=32m", "drill"):
            run = disk / "run"
            moment = f"file:{6 + number % 5}=STOP"
            running = lab.start(lab.words(run, moment=moment))
            wait_until_stopped(running)
            with broken(disk, random):
                began = send(running, signal.SIGCONT)
                ended = lab.end(running)
                seconds = time.monotonic() - began
                lab.check_mistake(ended, str(run))
                lab.check_run(run)
            return Outcome(lab.check_and_resume(run).images_repeated, seconds)

    return attempt


def move_clock(lab: Lab, random: Random, number: int) -> Outcome:
    """Move the clock back by an hour, or forward."""
    if shutil.which("g++") is None:
        pytest.xfail("there is no g++")
    library = lab.folder / "moved_clock.so"
    if not library.exists():
        command = ["g++", "-O2", "-shared", "-fPIC", HERE / "moved_clock.cpp", "-o", library]
        subprocess.run([*command, "-ldl"], check=True)
    run = lab.new()
    moment = f"clock:{random.randrange(1, STEPS)}={(-3600, 3600)[number % 2]}"
    result = lab.end(lab.start(lab.words(run, moment=moment), preload=str(library)))
    assert result.code == 0, f"it ended with {result.code}"
    seconds = lab.took_s
    lab.check_same(run)
    lab.check_run(run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    walls = [line["wall_s"] for line in lines]
    rising = all(a <= b for a, b in itertools.pairwise(walls))
    assert rising and walls[-1] < 60, f"wall_s is {walls}"
    rates = [line["time/images_per_s"] for line in lines]
    assert all(0 < rate < 1e6 for rate in rates), f"images/s are {rates}"
    return Outcome(0, seconds)


def loss_not_finite(lab: Lab, random: Random, number: int) -> Outcome:
    run = lab.new()
    step = random.randrange(STEPS)
    began = time.monotonic()
    ended = lab.run(run, moment=f"nan:{step + 1}")
    lab.check_mistake(ended, f"not finite at step {step} ")
    assert "whole" in ended.stderr, ended.stderr
    seen = [int(path.name) for path in named_checkpoints(run)]
    assert max(seen, default=0) <= step * BATCH, f"after step {step}: checkpoints {seen}"
    outcome = lab.check_and_resume(run)
    return Outcome(outcome.images_repeated, time.monotonic() - began)


def out_of_memory(lab: Lab, random: Random, number: int) -> Outcome:
    """Limit the address space of a run to less than its batch needs; run it again without."""
    run = lab.new()
    large = ("--train.global_batch=2048", "--train.total_images=4096")
    running = lab.start(lab.words(run, *large))
    send_when(running, signal.SIGSTOP, (run / "environment.json").exists)
    wait_until_stopped(running)
    free = random.randrange(150) * 2**20  # it needs about 350 MiB
    limit = psutil.Process(running.pid).memory_info().vms + free
    resource.prlimit(running.pid, resource.RLIMIT_AS, (limit, limit))
    began = send(running, signal.SIGCONT)
    ended = lab.end(running)
    seconds = time.monotonic() - began
    lab.check_mistake(ended, "do not fit into the memory")
    lab.check_run(run)
    again = lab.run(run, *large)
    assert again.code == 0, f"with memory, it ended with {again.code}"
    lab.check_run(run)
    return Outcome(0, seconds)


LONG_STEPS = 10_000
LOGS = 100


def long_run(lab: Lab, random: Random, number: int) -> Outcome:
    """Compare the second tenth of a run with its last: the minimum of each number.

    The minimum, as a save opens a file for a moment.
    """
    run = lab.new()
    every = LONG_STEPS // LOGS * BATCH
    cadence = [f"--train.{name}_every_images={every}" for name in ("log", "save", "sample")]
    running = lab.start(lab.words(run, f"--train.total_images={LONG_STEPS * BATCH}", *cadence))
    tenths: list[list[tuple[float, int, int]]] = [[] for _ in range(11)]
    process = psutil.Process(running.pid)
    while status_of(running):
        with contextlib.suppress(psutil.NoSuchProcess, OSError, ValueError):  # half a line
            numbers = process.memory_info().rss / 2**20, process.num_fds(), process.num_threads()
            tenths[len(metrics(run)) * 10 // LOGS].append(numbers)
        time.sleep(0.1)
    done = lab.end(running)
    assert done.code == 0, f"it ended with {done.code}"
    lab.check_run(run)
    early, late = ([min(column) for column in zip(*tenths[k], strict=True)] for k in (1, 9))
    note = ", ".join(
        f"{name} {a:.0f} and {b:.0f}"
        for name, a, b in zip(("MiB", "open files", "threads"), early, late, strict=True)
    )
    assert late[0] <= 1.02 * early[0], f"memory grows: {note}"
    assert late[1] <= early[1] and late[2] <= early[2], f"open files or threads grow: {note}"
    return Outcome(0, lab.took_s, f"in its second and its last tenth: {note}")


_LINE = "one line, readable, then same bytes"
_NAMED = "step named, nothing saved of it, same bytes"
_FLAT = "memory, open files and threads stay flat"
FAULTS = (
    Fault("disk full in a save", _LINE, 2, 10, save(full)),
    Fault("read-only folder in a save", _LINE, 2, 10, save(read_only)),
    Fault(
        "clock moved by an hour, back or forth", "same bytes, times plausible", 2, 10, move_clock
    ),
    Fault("loss is not finite", _NAMED, 3, 20, loss_not_finite),
    Fault("out of memory", "one line, nothing partial, then it runs", 1, 5, out_of_memory),
    Fault("10,000 steps", _FLAT, 0, 1, long_run, (pytest.mark.timeout(2000),)),
)
