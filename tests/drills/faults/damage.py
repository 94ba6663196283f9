"""A flipped bit or a truncated file: named, and never trained on."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

from tests.drills.lab import SAVE_EVERY, STEPS, Fault, Lab, Outcome
from tests.drills.run_contents import TENSORS, assert_same_tensors, is_whole, metrics
from tests.support.tiny import BATCH

NEWEST = 20  # steps of the damaged run


def damage(path: Path, random: Random, number: int) -> str:
    """Flip a bit, or truncate the file in every other attempt; describe the damage."""
    content = bytearray(path.read_bytes())
    at, bit = random.randrange(len(content)), random.randrange(8)
    if number % 2:
        os.truncate(path, at)
        return f"{path.name} cut to {at} of {len(content)} bytes"
    content[at] ^= 1 << bit
    path.write_bytes(content)
    return f"bit {bit} of byte {at} of {path.name}"


def shards(pattern: str) -> Callable[[Lab, Random, int], Outcome]:
    """Return an attempt of damage to a file of the shards."""

    def attempt(lab: Lab, random: Random, number: int) -> Outcome:
        run = lab.copy_up_to(NEWEST)
        own = run.parent / "shards"
        shutil.copytree(lab.shards, own)
        path = random.choice(sorted(own.glob(pattern)))
        what = damage(path, random, number)
        result = lab.run(run, f"--data.shards={own}")
        took_s = lab.took_s
        # A bit of the index that does not concern the images may have no effect.
        if result.code == 0 and path.suffix == ".json":
            lab.check_same(run)
            return Outcome(0, took_s, f"harmless: {what}")
        lab.check_mistake(result, str(own))
        assert len(metrics(run)) == NEWEST, f"it trained on {what}"
        named = path.name in result.stderr or path.suffix == ".json"
        assert named, f"{path.name} is not named after {what}: {result.stderr}"
        again = lab.check_and_resume(run, f"--data.shards={lab.shards}")
        return Outcome(again.images_repeated, took_s)

    return attempt


def checkpoint_file(name: str) -> Callable[[Lab, Random, int], Outcome]:
    """Return an attempt of damage to a file of the newest checkpoint."""

    def attempt(lab: Lab, random: Random, number: int) -> Outcome:
        run = lab.copy_up_to(NEWEST)
        newest = run / "checkpoints" / f"{NEWEST * BATCH:09d}"
        what = damage(newest / name, random, number)
        whole = is_whole(newest)  # white space of the manifest
        result = lab.run(run)
        assert result.code == 0, f"after {what} it ended with {result.code}"
        named = f"warning: checkpoint {newest} is skipped" in result.stderr
        assert named != whole, f"{newest} with {what}: {result.stderr}"
        lab.check_same(run)
        return Outcome(0 if whole else SAVE_EVERY * BATCH, lab.took_s)

    return attempt


def log(lab: Lab, random: Random, number: int) -> Outcome:
    run = lab.copy_up_to(NEWEST)
    path = run / "metrics.jsonl"
    what = damage(path, random, number)
    result = lab.run(run)
    assert result.code == 0, f"after {what} it ended with {result.code}"
    assert_same_tensors(run, lab.undisturbed_run)
    steps = [line["step"] for line in metrics(run)]
    assert steps == sorted(set(steps)), f"after {what}, the log has the steps {steps}"
    lost = STEPS - len(steps)
    reported = "metrics.jsonl" in result.stderr
    assert lost == 0 or reported, f"after {what}, {lost} lost lines are not reported"
    lab.check_run(run)
    return Outcome(0, lab.took_s)


def description(name: str) -> Callable[[Lab, Random, int], Outcome]:
    """Return an attempt of damage to the configuration or environment of a run."""

    def attempt(lab: Lab, random: Random, number: int) -> Outcome:
        run = lab.copy_up_to(NEWEST)
        path = run / name
        before = path.read_bytes()
        what = damage(path, random, number)
        result = lab.run(run)
        took_s = lab.took_s
        if result.code != 0:
            lab.check_mistake(result, str(run))
            path.write_bytes(before)
            return Outcome(lab.check_and_resume(run).images_repeated, took_s)
        lab.check_same(run)
        lab.check_run(run)
        return Outcome(0, took_s, f"harmless: {what}")

    return attempt


_SKIPPED = "named, skipped, same bytes"
_OR_SAME = "named, or same bytes"
FAULTS = (
    Fault("damaged shard", "named, not used", 2, 10, shards("*.tar")),
    Fault("damaged index.json", _OR_SAME, 2, 10, shards("index.json")),
    *(
        Fault(f"damaged {name} of a checkpoint", _SKIPPED, 2, 10, checkpoint_file(name))
        for name in (*TENSORS, "state.json", "manifest.json")
    ),
    Fault("damaged metrics.jsonl", "lost lines are reported, same bytes", 2, 10, log),
    Fault("damaged config.yaml", _OR_SAME, 2, 10, description("config.yaml")),
    Fault("damaged environment.json", "same bytes", 2, 10, description("environment.json")),
)
