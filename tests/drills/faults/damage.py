"""A bit flipped, or bytes cut, in each kind of file: named, and never trained on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

from tests.drills.disturb import cut, flip
from tests.drills.lab import SAVE_EVERY, STEPS, Fault, Lab, Outcome
from tests.drills.run_contents import TENSORS, is_whole, metrics
from tests.support.tiny import BATCH

NEWEST = 20  # steps: what is damaged was left by a run that had four to go


def damage(path: Path, random: Random, number: int) -> str:
    """Flip a bit and cut bytes in turn."""
    return (flip if number % 2 == 0 else cut)(path, random)


def shards(pick: Callable[[Path, Random], Path]) -> Callable[[Lab, Random, int], Outcome]:
    """Make a try of damage to a file of the shards."""

    def attempt(lab: Lab, random: Random, number: int) -> Outcome:
        run = lab.copy(NEWEST)
        own = run.parent / "shards"
        shutil.copytree(lab.shards, own)
        path = pick(own, random)
        what = damage(path, random, number)
        result = lab.run(run, f"--data.shards={own}")
        took_s = lab.took_s
        # A bit of the index that says nothing of the images may leave the run as it was.
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


def part(name: str) -> Callable[[Lab, Random, int], Outcome]:
    """Make a try of damage to a file of the newest checkpoint."""

    def attempt(lab: Lab, random: Random, number: int) -> Outcome:
        run = lab.copy(NEWEST)
        newest = run / "checkpoints" / f"{NEWEST * BATCH:09d}"
        what = damage(newest / name, random, number)
        whole = is_whole(newest)  # a bit of white space in the manifest
        result = lab.run(run)
        lab.expect(result.code == 0, f"after {what} it ended with {result.code}")
        named = f"warning: checkpoint {newest} is skipped" in result.stderr
        lab.expect(named != whole, f"{newest} with {what}: {result.stderr}")
        lab.expect_same(run)
        return Outcome(0 if whole else SAVE_EVERY * BATCH, lab.took_s)

    return attempt


def log(lab: Lab, random: Random, number: int) -> Outcome:
    """Damage the log: no step twice, and lines that are lost are told."""
    run = lab.copy(NEWEST)
    path = run / "metrics.jsonl"
    what = damage(path, random, number)
    result = lab.run(run)
    lab.expect(result.code == 0, f"after {what} it ended with {result.code}")
    lab.expect_same_tensors(run)
    steps = [line["step"] for line in metrics(run)]
    lab.expect(steps == sorted(set(steps)), f"after {what}, the log has the steps {steps}")
    lost = STEPS - len(steps)
    told = "metrics.jsonl" in result.stderr
    lab.expect(lost == 0 or told, f"after {what}, {lost} lines are lost, and nobody is told")
    lab.check_run(run)
    return Outcome(0, lab.took_s)


def settings(name: str) -> Callable[[Lab, Random, int], Outcome]:
    """Make a try of damage to what a run folder says of the run."""

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


def a_tar(folder: Path, random: Random) -> Path:
    return random.choice(sorted(folder.glob("*.tar")))


_PASSED_OVER = "named, passed over, same bytes"
_NAMED = "named, not trained on"
FAULTS = (
    Fault("damaged shard", _NAMED, 2, 10, shards(a_tar)),
    Fault(
        "damaged index.json", "named, or same bytes", 2, 10, shards(lambda p, _: p / "index.json")
    ),
    *(
        Fault(f"damaged {name} of a checkpoint", _PASSED_OVER, 2, 10, part(name))
        for name in (*TENSORS, "state.json", "manifest.json")
    ),
    Fault("damaged metrics.jsonl", "lost lines are told, same bytes", 2, 10, log),
    Fault("damaged config.yaml", "named, or same bytes", 2, 10, settings("config.yaml")),
    Fault("damaged environment.json", "same bytes", 2, 10, settings("environment.json")),
)
