"""Builds of shards that are killed or stopped halfway."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from random import Random

from shards.verify import verify
from tests.drills.disturb import as_soon_as, at_random
from tests.drills.lab import Fault, Lab, Outcome
from tests.support.tiny import LAUNCH

SHARD_SIZE = 40  # eight tars
BUILD = LAUNCH.parent / "shards" / "build.py"


def build_command(lab: Lab, out: Path) -> list[object]:
    source = f"folder:{lab.pictures}"
    options = ["--source", source, "--split", "train", "--shard-size", SHARD_SIZE]
    return [BUILD, *options, "--out", out]


def undisturbed(lab: Lab) -> dict[str, bytes]:
    """Build once without a fault; return the bytes of each file."""
    out = lab.folder / "built" / "shards"
    if not out.exists():
        done = lab.end(lab.start(build_command(lab, out)))
        lab.expect(done.code == 0, f"an undisturbed build ended with {done.code}")
    return contents(out)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def num_files(out: Path) -> int:
    """Count the files in the temporary folder of a build."""
    try:
        return sum(len(list(path.iterdir())) for path in out.parent.glob(".*"))
    except FileNotFoundError:  # it was renamed or removed meanwhile
        return 0


def check_and_build(lab: Lab, out: Path, began: float) -> Outcome:
    """Check that no partial build has its final name, and that building again is identical."""
    ended = time.monotonic()
    lab.expect_nothing_outside()
    if out.exists():
        verify(out)
        lab.expect(contents(out) == undisturbed(lab), f"{out} exists, with other bytes")
    else:
        again = lab.end(lab.start(build_command(lab, out)))
        lab.expect(again.code == 0, f"building again ended with {again.code}: {again.stderr}")
        lab.expect(contents(out) == undisturbed(lab), "building again gave other bytes")
    left = [path.name for path in out.parent.iterdir() if path != out]
    lab.expect(not left or out.exists(), f"left behind: {left}")
    return Outcome(0, ended - began)


def kill(lab: Lab, random: Random, number: int) -> Outcome:
    """Kill once the temporary folder holds 0, 1, ... files; the index is written last."""
    expected = undisturbed(lab)
    count = number % (len(expected) + 1)
    out = lab.new("shards")
    running = lab.start(build_command(lab, out))
    as_soon_as(
        running,
        signal.SIGKILL,
        lambda: (num_files(out) >= count and any(out.parent.glob(".*"))) or out.exists(),
    )
    began = time.monotonic()
    lab.end(running)
    return check_and_build(lab, out, began)


def stop(lab: Lab, random: Random, number: int) -> Outcome:
    """Request a stop at a random moment; nothing partial may be left."""
    undisturbed(lab)
    out = lab.new("shards")
    out.parent.mkdir()
    running = lab.start(build_command(lab, out))
    began = at_random(running, signal.SIGTERM, random, 0.5)
    stopped = lab.end(running)
    allowed = (0, 128 + signal.SIGTERM, -signal.SIGTERM)  # the last before the handler is installed
    lab.expect(stopped.code in allowed, f"after SIGTERM it ended with {stopped.code}")
    if stopped.code != 0:
        left = [path.name for path in out.parent.iterdir() if path != out]  # `out` is checked below
        lab.expect(not left, f"left behind: {left}")
    return check_and_build(lab, out, began)


FAULTS = (
    Fault("SIGKILL in a build, at each file", "no partial shards, same bytes again", 5, 30, kill),
    Fault("SIGTERM in a build", "nothing left, same bytes again", 2, 20, stop),
)
