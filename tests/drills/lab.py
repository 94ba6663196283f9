"""The drill's test bench: tiny shards, an undisturbed run, runs to disturb, and checks."""

from __future__ import annotations

import filecmp
import itertools
import json
import shutil
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any

import yaml
from PIL import Image

from dgm.common.cache import cache_root
from dgm.report.read_run import read_run
from dgm.training import checkpoint
from shards import shapes
from shards.build import build
from tests.drills.run_contents import (
    TENSORS,
    is_intact,
    metrics,
    named_checkpoints,
    newest_complete,
)
from tests.support.processes import free_port
from tests.support.tiny import BATCH, LAUNCH, TINY
from tests.support.warm_processes import Result, Running, Warm, plain_environment

HERE = Path(__file__).parent
SIGNAL_AT = HERE / "signal_at.py"
STEPS = 24  # more than one pass over the images
SAVE_EVERY = 4  # steps
NUM_IMAGES = 320
PATIENCE_S = 120.0
"""Time after which a run, which takes seconds, is considered hanging."""


class BrokenPromise(Exception):  # noqa: N818 - a result, not an error
    """A promise that was not held."""


class NotPossible(Exception):  # noqa: N818 - a result, not an error
    """A fault cannot be created on this machine."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of one attempt in which the promise was held."""

    images_lost: int = 0
    seconds: float = 0.0  # from the fault to the end of the disturbed process
    note: str = ""


@dataclass(frozen=True)
class Fault:
    """A fault, and the promise that is checked."""

    name: str
    promise: str
    short: int  # number of attempts with --short
    long: int  # number of attempts without
    attempt: Callable[[Lab, Random, int], Outcome] = field(repr=False)
    """Called with the number of the attempt, from 0."""


class Lab:
    """A folder with runs to disturb, and with all folders that they might write to."""

    def __init__(self, folder: Path):
        self.folder, self.numbers = folder, itertools.count()
        self.outside = [folder / name for name in ("home", "tmp", "elsewhere", "cache")]
        for path in (*self.outside, folder / "attempts"):
            path.mkdir(parents=True)
        self.home, self.tmp, self.elsewhere, self.cache = self.outside
        self.environment = plain_environment(self.cache) | {
            "HOME": str(self.home),
            "TMPDIR": str(self.tmp),
            "SLURM_CPUS_PER_TASK": "1",  # two threads would slow down so small a net
        }
        self.cached: dict[str, Any] = {}  # results of `once`
        self.warms: list[Warm] = []
        self.running: dict[Running | subprocess.Popen, float] = {}  # and the time of the start
        self.seconds = 0.0  # duration of the undisturbed run
        self.output, self.took_s = "", 0.0  # of the process that ended last
        self.known_outside: set[Path] = set()

    def close(self) -> None:
        """End all processes; keep the folder."""
        self.clear()
        for warm in self.warms:
            warm.close()

    def clear(self) -> None:
        """Kill running and stopped processes of a failed attempt."""
        while self.running:
            self.running.popitem()[0].kill()

    def new_warm(self, variables: dict[str, str]) -> Warm:
        """Return a server of processes that have imported torch, with further variables."""
        folder = self.folder / "warm" / str(len(self.warms))
        folder.mkdir(parents=True)
        self.warms.append(Warm(folder, {**self.environment, **variables}))
        return self.warms[-1]

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """Return a value that is created on first use."""
        if name not in self.cached:
            self.cached[name] = make()
        return self.cached[name]

    # Inputs of the runs.

    @cached_property
    def pictures(self) -> Path:
        """A class-folder tree of shapes."""
        root = self.folder / "pictures"
        for index in range(NUM_IMAGES):
            folder = root / shapes.CLASSES[index % len(shapes.CLASSES)]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(shapes.render("train", index)).save(folder / f"{index:04d}.png")
        return root

    @cached_property
    def shards(self) -> Path:
        """Shards of the pictures, in four tars."""
        out = self.folder / "shards"
        build(f"folder:{self.pictures}", "train", out, shard_size=90, progress=False)
        return out

    @cached_property
    def config(self) -> Path:
        """The configuration of the runs, which log every step."""
        path = self.folder / "config.yaml"
        keys: dict[str, Any] = {**TINY["diffusion"], "data": {"shards": str(self.shards)}}
        every = {"log": 1, "save": SAVE_EVERY, "sample": 8}
        cadence = {f"{name}_every_images": steps * BATCH for name, steps in every.items()}
        keys["train"] = {**keys["train"], "total_images": STEPS * BATCH, **cadence}
        path.write_text(yaml.safe_dump(keys))
        return path

    def undisturbed_run(self, processes: int = 1) -> Path:
        """Return the undisturbed run on this number of processes, trained on first use."""
        run = self.folder / f"undisturbed-{processes}"
        if not run.exists():
            began = time.monotonic()
            done = self.run(run, processes=processes)
            self.expect(done.code == 0, f"the undisturbed run ended with {done.code}")
            self.seconds = self.seconds or time.monotonic() - began
        return run

    def prepare(self) -> None:
        """Create what every attempt needs, and list the files outside of runs."""
        compiled = cache_root().glob("kernels-*.so")
        (self.cache / "dgm").mkdir()
        for path in compiled:  # reuse the user's kernels, as compiling takes a while
            shutil.copy(path, self.cache / "dgm")
        warmed = self.run(self.folder / "warmed")  # compiles them if there were none
        self.expect(warmed.code == 0, f"a first run ended with {warmed.code}: {self.output}")
        self.undisturbed_run()
        self.known_outside = self._outside()

    # Starting processes.

    def new(self, name: str = "run") -> Path:
        """Return an unused path for one attempt."""
        return self.folder / "attempts" / f"{next(self.numbers):04d}" / name

    def words(self, run: Path, *options: str) -> list[object]:
        """Return the command that trains into a folder."""
        script = LAUNCH / "train_ddpm.py"
        return [script, "--config", self.config, "--run.dir", run, *options]

    def start(
        self,
        words: Sequence[object],
        processes: int = 1,
        terminate_others: bool = True,
        warm: Warm | None = None,
    ) -> Running:
        """Start `python WORDS`."""
        output = self.folder / "output" / f"{next(self.numbers):04d}"
        output.mkdir(parents=True)
        port = free_port() if processes > 1 else 0
        running = (warm or self.once("warm", lambda: self.new_warm({}))).start(
            words, output, self.elsewhere, processes, port, terminate_others=terminate_others
        )
        self.running[running] = time.monotonic()
        return running

    def end(self, running: Running, patience: float = PATIENCE_S) -> Result:
        """Wait for the end of a process; raise BrokenPromise if it hangs."""
        began = self.running.pop(running)
        try:
            result = running.wait(patience)
        except TimeoutError:
            self.output = (running.output / "stderr").read_text()
            raise BrokenPromise(f"it hangs: no end within {patience:.0f} s") from None
        self.output, self.took_s = f"{result.stdout}{result.stderr}", time.monotonic() - began
        return result

    def run(self, run: Path, *options: str, moment: str | None = None, **how: Any) -> Result:
        """Train to the end, or to a moment as in signal_at.py."""
        driver: list[object] = [] if moment is None else [SIGNAL_AT, moment]
        return self.end(self.start([*driver, *self.words(run, *options)], **how))

    def copy(self, newest: int) -> Path:
        """Copy the undisturbed run, as if killed after its checkpoint of `newest` steps."""
        run = self.new()
        shutil.copytree(self.undisturbed_run(), run)
        for path in named_checkpoints(run):
            if int(path.name) > newest * BATCH:
                shutil.rmtree(path)
        log = run / "metrics.jsonl"
        log.write_text("".join(log.read_text().splitlines(keepends=True)[:newest]))
        return run

    # Checking what is left.

    def expect(self, held: bool, message: str) -> None:
        """Raise BrokenPromise with a message unless a promise was held."""
        if not held:
            raise BrokenPromise(message)

    def expect_mistake(self, result: Result, *named: str) -> None:
        """Expect exit code 2 and one line `error: ...` that contains all of `named`."""
        lines = [x for x in result.stderr.splitlines() if x.startswith("error: ")]
        self.expect(result.code == 2, f"exit code {result.code}, not 2: {result.stderr[-500:]}")
        self.expect("Traceback" not in result.stderr, f"a traceback: {result.stderr[-500:]}")
        self.expect(len(lines) == 1, f"{len(lines)} error lines: {lines}")
        for name in named:
            self.expect(name in lines[0], f"{name} is not in {lines[0]}")

    def check_run(self, run: Path) -> int:
        """Check that a run is readable, without partial files; return its images seen."""
        self.expect_nothing_outside()
        if not (run / "config.yaml").exists():
            found = sorted(p.name for p in run.iterdir()) if run.exists() else []
            self.expect(
                set(found) <= {".config.yaml.tmp", ".lock", "lock", "slurm"},
                f"left behind: {found}",
            )
            return 0
        with warnings.catch_warnings(record=True):
            warnings.simplefilter("always")
            seen = read_run(run, "run", "diffusion", {}).images_seen
            found = checkpoint.newest(run / "checkpoints")
        self.expect(found == newest_complete(run), f"newest is {found}, not {newest_complete(run)}")
        if found is not None:
            checkpoint.read(found)
        for path in named_checkpoints(run):
            self.expect(is_intact(path), f"{path} has its final name, but is not intact")
        for path in run.rglob("*.json"):
            if not any(part.startswith((".", "damaged")) for part in path.relative_to(run).parts):
                json.loads(path.read_text())
        for path in (run / "samples").glob("*.png"):
            with Image.open(path) as image:
                image.load()
        return seen

    def check_and_continue(
        self, run: Path, *options: str, began: float | None = None, processes: int = 1
    ) -> Outcome:
        """Check a run after a fault, run the same command again, compare with the undisturbed run.

        Images lost are those in the log that the continued run trains on again.
        """
        ended = time.monotonic()
        seen = self.check_run(run)
        saved = newest_complete(run)
        again = self.run(run, *options, processes=processes)
        self.expect(again.code == 0, f"continuing ended with {again.code}: {again.stderr[-500:]}")
        self.expect_same(run, processes)
        at = int(saved.name) if saved else 0
        lines = (f"continues at:    {at:,} images", f"already seen:    {at:,} of")
        printed = at == 0 or any(line in again.stdout for line in lines)
        self.expect(printed, f"it does not print that it continues at {at:,} images")
        return Outcome(max(seen - at, 0), ended - (ended if began is None else began))

    def expect_same(self, run: Path, processes: int = 1) -> None:
        """Compare a finished run with the undisturbed one: tensors, pictures, log."""
        self.expect_nothing_outside()
        self.expect_same_tensors(run, processes)
        undisturbed = self.undisturbed_run(processes)
        self.expect(metrics(run) == metrics(undisturbed), f"{run}/metrics.jsonl: other lines")
        for path in (undisturbed / "samples").iterdir():
            same = filecmp.cmp(path, run / "samples" / path.name, shallow=False)
            self.expect(same, f"samples/{path.name}: other bytes")
        left = [str(path) for path in run.rglob(".partial-*")]
        self.expect(not left, f"left behind: {left}")

    def expect_same_tensors(self, run: Path, processes: int = 1) -> None:
        """Expect the bytes of weights, EMA and optimizer that the undisturbed run has."""
        last = f"checkpoints/{STEPS * BATCH:09d}"
        for name in TENSORS:
            ours, theirs = run / last / name, self.undisturbed_run(processes) / last / name
            self.expect(ours.exists(), f"{ours} is missing")
            self.expect(filecmp.cmp(ours, theirs, shallow=False), f"{ours}: other bytes")

    def expect_nothing_outside(self) -> None:
        """Expect no new files in the home, temporary, working and cache folders."""
        new = self._outside() - self.known_outside
        self.expect(not new, f"written outside of the run folder: {sorted(map(str, new))[:5]}")

    def _outside(self) -> set[Path]:
        return {path for root in self.outside for path in root.rglob("*")}


@contextmanager
def open_lab(folder: Path) -> Iterator[Lab]:
    """Yield a prepared lab in a new folder; end its processes afterwards."""
    lab = Lab(folder)
    try:
        lab.prepare()
        yield lab
    finally:
        lab.close()
