"""A flipped bit or a truncation of each kind of file, which must be named and never trained on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

from tests.drills.disturb import cut, flip
from tests.drills.lab import SAVE_EVERY, STEPS, Fault, Lab, Outcome
from tests.drills.run_contents import TENSORS, is_intact, metrics
from tests.support.tiny import BATCH

NEWEST = 20  # steps of the newest checkpoint, of 24 in all


def damage(path: Path, random: Random, number: int) -> str:
    """Flip a bit or truncate the file, alternating between attempts; return which."""
    return (flip if number % 2 == 0 else cut)(path, random)


def shards(pick: Callable[[Path, Random], Path]) -> Callable[[Lab, Random, int], Outcome]:
    """Return an attempt that damages a file of the shards."""

    def attempt(lab: Lab, random: Random, number: int) -> Outcome:
        run = lab.copy(NEWEST)
        own = run.parent / "shards"
        shutil.copytree(lab.shards, own)
        path = pick(own, random)
        what = damage(path, random, number)
        result = lab.run(run, f"--data.shards={own}")
        took_s = lab.took_s
        # A bit of the index may have no effect on the images.
        if result.code == 0 and path.suffix == ".json":
            lab.expect_same(run)
            return Outcome(0, took_s, f"harmless: {what}")
        lab.expect_mistake(result, str(own))
        lab.expect(len(metrics(run)) == NEWEST, f"it trained on {what}")
        named = path.name in result.stderr or path.suffix == ".json"
        lab.expect(named, f"{path.name} is not named after {what}: {result.stderr}")
        again = lab.check_and_continue(run, f"--data.shards={lab.shards}")
        return Outcome(again.images_lost, took_s)

    return attempt


def checkpoint_file(name: str) -> Callable[[Lab, Random, int], Outcome]:
    """Return an attempt that damages a file of the newest checkpoint."""

    def attempt(lab: Lab, random: Random, number: int) -> Outcome:
        run = lab.copy(NEWEST)
        newest = run / "checkpoints" / f"{NEWEST * BATCH:09d}"
        what = damage(newest / name, random, number)
        intact = is_intact(newest)  # if only the last newline of the manifest was cut
        result = lab.run(run)
        lab.expect(result.code == 0, f"after {what} it ended with {result.code}")
        named = f"warning: checkpoint {newest} is skipped" in result.stderr
        lab.expect(named != intact, f"{newest} with {what}: {result.stderr}")
        lab.expect_same(run)
        return Outcome(0 if intact else SAVE_EVERY * BATCH, lab.took_s)

    return attempt


def log(lab: Lab, random: Random, number: int) -> Outcome:
    """Damage the log: no step may be logged twice, and lost lines must be reported."""
    run = lab.copy(NEWEST)
    path = run / "metrics.jsonl"
    what = damage(path, random, number)
    result = lab.run(run)
    lab.expect(result.code == 0, f"after {what} it ended with {result.code}")
    lab.expect_same_tensors(run)
    steps = [line["step"] for line in metrics(run)]
    lab.expect(steps == sorted(set(steps)), f"after {what}, the log has the steps {steps}")
    lost = STEPS - len(steps)
    reported = "metrics.jsonl" in result.stderr
    lab.expect(lost == 0 or reported, f"after {what}, {lost} lost lines are not reported")
    lab.check_run(run)
    return Outcome(0, lab.took_s)


def run_file(name: str) -> Callable[[Lab, Random, int], Outcome]:
    """Return an attempt that damages a file that describes the run."""

    def attempt(lab: Lab, random: Random, number: int) -> Outcome:
        run = lab.copy(NEWEST)
        path = run / name
        before = path.read_bytes()
        what = damage(path, random, number)
        result = lab.run(run)
        took_s = lab.took_s
        if result.code != 0:
            lab.expect_mistake(result, str(run))
            path.write_bytes(before)
            return Outcome(lab.check_and_continue(run).images_lost, took_s)
        lab.expect_same(run)
        if path.suffix == ".json":
            json.loads(path.read_text())
        lab.check_run(run)
        return Outcome(0, took_s, f"harmless: {what}")

    return attempt


def random_tar(folder: Path, random: Random) -> Path:
    return random.choice(sorted(folder.glob("*.tar")))


_SKIPPED = "named, skipped, same bytes"
FAULTS = (
    Fault("damaged shard", "named, not used", 2, 10, shards(random_tar)),
    Fault(
        "damaged index.json", "named, or same bytes", 2, 10, shards(lambda p, _: p / "index.json")
    ),
    *(
        Fault(f"damaged {name} of a checkpoint", _SKIPPED, 2, 10, checkpoint_file(name))
        for name in (*TENSORS, "state.json", "manifest.json")
    ),
    Fault("damaged metrics.jsonl", "lost lines are reported, same bytes", 2, 10, log),
    Fault("damaged config.yaml", "named, or same bytes", 2, 10, run_file("config.yaml")),
    Fault("damaged environment.json", "same bytes", 2, 10, run_file("environment.json")),
)
