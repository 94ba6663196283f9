"""Changes around a run: the reader of its output, the owner of its files, its images."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from random import Random

from PIL import Image

from shards import shapes
from tests.drills.lab import BATCH, HERE, LAUNCH, NUM_IMAGES, Fault, Lab, NotPossible, Outcome
from tests.drills.run_contents import named_checkpoints

WITHOUT_RIGHTS = LAUNCH.parent / "tests" / "support" / "without_rights.py"
OTHER_UID = 12345  # of no known user
MAX_ADDED = 20  # images


def reader_ends(lab: Lab, random: Random, number: int) -> Outcome:
    run = lab.new()
    driver: list[object] = [HERE / "ends_reading.py", random.randrange(600)]
    began = time.monotonic()
    done = lab.end(lab.start([*driver, *lab.words(run)]))
    lab.expect(done.code == 0, f"it ended with {done.code}: {done.stderr[-500:]}")
    lab.check_run(run)
    lab.expect_same(run)
    return Outcome(0, time.monotonic() - began)


def another_owner(lab: Lab, random: Random, number: int) -> Outcome:
    if os.geteuid() != 0:
        raise NotPossible("only root can give files away")
    run = lab.copy(20)
    newest = named_checkpoints(run)[-1]
    denied = random.choice([newest, *sorted(newest.iterdir()), run / "config.yaml"])
    cached = [lab.cache, *lab.cache.rglob("*")]
    try:
        for path in (run, *run.rglob("*"), *cached):
            os.chown(path, OTHER_UID, OTHER_UID)
        for path in (run, *run.rglob("*")):
            path.chmod(0o777 if path.is_dir() else 0o666)
        denied.chmod(0)
        before = contents(run / "checkpoints")
        began = time.monotonic()
        refused = lab.end(lab.start([WITHOUT_RIGHTS, *lab.words(run)]))
        lab.expect_mistake(refused, f"{denied} may not be read", "chmod")
        lab.expect(contents(run / "checkpoints") == before, "checkpoints have changed")
        denied.chmod(0o777 if denied.is_dir() else 0o666)  # as the error message suggests
        again = lab.end(lab.start([WITHOUT_RIGHTS, *lab.words(run)]))
        lab.expect(again.code == 0, f"continuing ended with {again.code}: {again.stderr[-500:]}")
        lab.expect_same(run)
    finally:
        for path in cached:
            os.chown(path, os.geteuid(), os.getegid())
    return Outcome(0, time.monotonic() - began)


def other_images(lab: Lab, random: Random, number: int) -> Outcome:
    folder = lab.new("pictures")
    shutil.copytree(lab.pictures, folder)
    out, run = folder.with_name("shards"), folder.with_name("run")
    build = [LAUNCH.parent / "shards" / "build.py", "--source", f"folder:{folder}"]
    build += ["--split", "train", "--out", out]

    def train(run: Path, steps: int):
        options = [f"--data.shards={out}", f"--train.total_images={steps * BATCH}"]
        return lab.run(run, *options)

    built = lab.end(lab.start(build))
    lab.expect(built.code == 0, f"building ended with {built.code}: {built.stderr}")
    lab.expect(train(run, 8).code == 0, f"training failed: {lab.output}")
    before = contents(run)
    for index in range(NUM_IMAGES, NUM_IMAGES + random.randint(1, MAX_ADDED)):
        path = folder / shapes.CLASSES[index % len(shapes.CLASSES)] / f"{index:04d}.png"
        Image.fromarray(shapes.render("train", index)).save(path)
    shutil.rmtree(out)
    built = lab.end(lab.start(build))
    lab.expect(built.code == 0, f"building again ended with {built.code}: {built.stderr}")
    began = time.monotonic()
    lab.expect_mistake(train(run, 16), str(run), "other images")
    lab.expect(contents(run) == before, "the run folder has changed")
    took_s = time.monotonic() - began
    new = train(folder.with_name("new"), 8)
    lab.expect(new.code == 0, f"a new run ended with {new.code}: {new.stderr[-500:]}")
    return Outcome(0, took_s)


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of each file in a folder, except the lock."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


FAULTS = (
    Fault("reader of the output ends", "trains to the end, same bytes", 4, 20, reader_ends),
    Fault(
        "run folder and caches of another user",
        "named, not damaged, same bytes",
        2,
        7,
        another_owner,
    ),
    Fault("images changed between two starts", "refused, nothing changed", 1, 5, other_images),
)
