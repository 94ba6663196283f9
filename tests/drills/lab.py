"""What the drill works with: shards, an undisturbed run, runs to break, and checks."""

from __future__ import annotations

import filecmp
import itertools
import json
import os
import shutil
import subprocess
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import psutil
import pytest
import yaml
from PIL import Image

from dgm.common.atomic_dirs import cache_root
from dgm.report.read_run import read_run
from dgm.training import checkpoint
from tests.drills.run_contents import (
    assert_same_tensors,
    is_whole,
    metrics,
    named_checkpoints,
    newest_whole,
)
from tests.support.processes import Result, Running, Warm, plain_environment
from tests.support.tiny import BATCH, LAUNCH, TINY

HERE = Path(__file__).parent
SIGNAL_AT = HERE / "signal_at.py"
STEPS = 24  # more than one pass over the images
SAVE_EVERY = 4  # steps
PATIENCE_S = 120.0
"""A run of seconds that takes longer hangs."""


@dataclass(frozen=True)
class Outcome:
    """An attempt that kept the promise."""

    images_repeated: int = 0
    seconds: float = 0.0  # from the fault to the end of the process
    note: str = ""


@dataclass(frozen=True)
class Fault:
    """A fault and the promise for it; `attempt` raises AssertionError if it is broken.

    It calls pytest.xfail where the machine does not allow the fault.
    """

    name: str
    promise: str
    short: int  # attempts
    long: int
    attempt: Callable[[Lab, Random, int], Outcome]  # int: number of the attempt
    marks: tuple[pytest.MarkDecorator, ...] = ()


class Lab:
    """A folder with the runs to break and all folders that they might write to."""

    def __init__(self, folder: Path, shards: Path):
        self.folder, self.shards, self.numbers = folder, shards, itertools.count()
        self.config, self.undisturbed_run = folder / "config.yaml", folder / "undisturbed"
        self.place = folder  # of the current attempt
        self.outside = [folder / name for name in ("home", "tmp", "elsewhere", "cache")]
        for path in self.outside:
            path.mkdir(parents=True)
        home, tmp, self.elsewhere, self.cache = self.outside
        self.environment = plain_environment(self.cache) | {
            "HOME": str(home),
            "TMPDIR": str(tmp),
            "SLURM_CPUS_PER_TASK": "1",  # more threads would only wait in a net this small
        }
        self.warm: dict[str, Warm] = {}  # by the library that is preloaded
        self.running: dict[Running | subprocess.Popen, float] = {}  # start times
        self.seconds = 0.0  # duration of the undisturbed run
        self.output, self.took_s = "", 0.0  # of the process that ended last
        self.files_outside: set[Path] = set()

    def close(self) -> None:
        """End all processes; keep the folder."""
        self.clear()
        for warm in self.warm.values():
            warm.close()

    def clear(self) -> None:
        """Kill running and stopped processes of a failed attempt."""
        while self.running:
            self.running.popitem()[0].kill()

    def prepare(self) -> None:
        """Write the configuration, train the undisturbed run, and list the files outside of it."""
        keys: dict[str, Any] = {**TINY["diffusion"], "data": {"shards": str(self.shards)}}
        every = {"log": 1, "save": SAVE_EVERY, "sample": 8}
        cadence = {f"{name}_every_images": steps * BATCH for name, steps in every.items()}
        keys["train"] = {**keys["train"], "total_images": STEPS * BATCH, **cadence}
        self.config.write_text(yaml.safe_dump(keys))
        (self.cache / "dgm").mkdir()
        for path in cache_root().glob("kernels-*.so"):  # compiling them takes a while
            shutil.copy(path, self.cache / "dgm")
        for run in (self.folder / "first", self.undisturbed_run):  # the first fills the caches
            done = self.run(run)
            assert done.code == 0, f"an undisturbed run ended with {done.code}: {self.output}"
        self.seconds = self.took_s
        self.files_outside = self._list_outside()

    # Start and end runs

    def new(self, name: str = "run") -> Path:
        """Return an unused path for one attempt."""
        return self.place / str(next(self.numbers)) / name

    def words(self, run: Path, *options: str, moment: str | None = None) -> list[object]:
        """Return the command that trains into a folder, up to a moment of signal_at.py."""
        driver = [] if moment is None else [SIGNAL_AT, moment]
        script = LAUNCH / "train_ddpm.py"
        return [*driver, script, "--config", self.config, "--run.dir", run, *options]

    def start(self, words: Sequence[object], preload: str = "") -> Running:
        """Start `python WORDS`, optionally with a preloaded library."""
        if preload not in self.warm:
            folder = self.folder / "warm" / str(len(self.warm))
            folder.mkdir(parents=True)
            self.warm[preload] = Warm(folder, {**self.environment, "LD_PRELOAD": preload})
        output = self.folder / "output" / f"{next(self.numbers):04d}"
        output.mkdir(parents=True)
        running = self.warm[preload].start(words, output, self.elsewhere)
        self.running[running] = time.monotonic()
        return running

    def end(self, running: Running, patience_s: float = PATIENCE_S) -> Result:
        """Wait for the end of a started process, which must not hang."""
        began = self.running.pop(running)
        try:
            result = running.wait(patience_s)
        except TimeoutError:
            self.output = (running.output / "stderr").read_text()
            raise AssertionError(f"it hangs: no end within {patience_s:.0f} s") from None
        self.output, self.took_s = f"{result.stdout}{result.stderr}", time.monotonic() - began
        return result

    def run(self, run: Path, *options: str, moment: str | None = None) -> Result:
        """Train, up to a moment of signal_at.py or the end."""
        return self.end(self.start(self.words(run, *options, moment=moment)))

    def copy_up_to(self, step: int) -> Path:
        """Copy the undisturbed run, as if killed after its checkpoint of this step."""
        run = self.new()
        shutil.copytree(self.undisturbed_run, run)
        for path in named_checkpoints(run):
            if int(path.name) > step * BATCH:
                shutil.rmtree(path)
        log = run / "metrics.jsonl"
        log.write_text("".join(log.read_text().splitlines(keepends=True)[:step]))
        return run

    # Check what they leave

    def check_mistake(self, result: Result, *named: str) -> None:
        """Check for exit code 2 and one line `error: ...` that names all of these."""
        lines = [x for x in result.stderr.splitlines() if x.startswith("error: ")]
        assert result.code == 2, f"exit code {result.code}, not 2: {result.stderr[-500:]}"
        assert "Traceback" not in result.stderr, f"a traceback: {result.stderr[-500:]}"
        assert len(lines) == 1, f"{len(lines)} lines of error: {lines}"
        for name in named:
            assert name in lines[0], f"{name} is not named: {lines[0]}"

    def check_run(self, run: Path) -> int:
        """Check that a run is readable, without partial files; return its images seen."""
        self.check_outside()
        if not (run / "config.yaml").exists():
            found = {p.name for p in run.iterdir()} if run.exists() else set()
            assert found <= {".config.yaml.tmp", ".lock", "slurm"}, f"left: {sorted(found)}"
            return 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            seen = read_run(run, "run", "diffusion", {}).images_seen
            newest = checkpoint.newest(run / "checkpoints")
        assert newest == newest_whole(run), f"newest is {newest}, not {newest_whole(run)}"
        if newest is not None:
            checkpoint.read(newest)
        for path in named_checkpoints(run):
            assert is_whole(path), f"{path} has its final name, but is not whole"
        for path in run.rglob("*.json"):
            if not any(part.startswith((".", "damaged")) for part in path.relative_to(run).parts):
                json.loads(path.read_text())
        for path in (run / "samples").glob("*.png"):
            with Image.open(path) as image:
                image.load()
        return seen

    def check_and_resume(self, run: Path, *options: str, began: float | None = None) -> Outcome:
        """Check a run after a fault, resume it and compare it with the undisturbed run.

        Images repeated are those of the log that the resumed run trains on again.
        """
        ended = time.monotonic()
        seen = self.check_run(run)
        saved = newest_whole(run)
        again = self.run(run, *options)
        assert again.code == 0, f"the resumed run ended with {again.code}: {again.stderr[-500:]}"
        self.check_same(run)
        at = int(saved.name) if saved else 0
        lines = (f"continues at:    {at:,} images", f"already seen:    {at:,} of")
        assert at == 0 or any(line in again.stdout for line in lines), f"not resumed at {at:,}"
        return Outcome(max(seen - at, 0), 0.0 if began is None else ended - began)

    def check_same(self, run: Path) -> None:
        """Compare a finished run with the undisturbed one: tensors, pictures, log."""
        self.check_outside()
        undisturbed = self.undisturbed_run
        assert_same_tensors(run, undisturbed)
        assert metrics(run) == metrics(undisturbed), f"{run}/metrics.jsonl: other lines"
        for path in (undisturbed / "samples").iterdir():
            same = filecmp.cmp(path, run / "samples" / path.name, shallow=False)
            assert same, f"samples/{path.name}: other bytes"
        left = [str(path) for path in run.rglob(".partial-*")]
        assert not left, f"left behind: {left}"

    def check_outside(self) -> None:
        """Check that home, temporary folder, working folder and cache have no new file."""
        new = self._list_outside() - self.files_outside
        assert not new, f"written outside of the run folder: {sorted(map(str, new))[:5]}"

    def _list_outside(self) -> set[Path]:
        return {path for root in self.outside for path in root.rglob("*")}


def send(running: Running, number: int) -> float:
    """Send a signal to a process if it still exists; return the time."""
    with suppress(ProcessLookupError):
        os.kill(running.pid, number)
    return time.monotonic()


def send_when(running: Running, number: int, condition: Callable[[], bool]) -> float:
    """Send a signal as soon as a condition holds or the process has ended; return the time."""
    began = time.monotonic()
    while status_of(running) and not condition() and time.monotonic() - began < PATIENCE_S:
        pass
    return send(running, number)


def wait_until_stopped(running: Running) -> None:
    """Wait until SIGSTOP has stopped a process."""
    while (status := status_of(running)) != psutil.STATUS_STOPPED:
        assert status is not None, "it ended before the moment to stop it"
        time.sleep(0.002)


def status_of(running: Running) -> str | None:
    """Return psutil's status of a process; None if it has ended."""
    try:
        status = psutil.Process(running.pid).status()
    except psutil.NoSuchProcess:
        return None
    return None if status == psutil.STATUS_ZOMBIE else status
