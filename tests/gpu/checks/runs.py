"""Whole training runs, each a process of its own, in parallel, compared afterwards."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dgm.cli.parser import TRAINERS
from dgm.common.run_files import read_metrics
from tests.gpu.checks.registry import Context, Group
from tests.gpu.processes import run_limited

RUN_S = 120.0  # time limit of one training run
FILES = ("model.safetensors", "ema.safetensors", "optimizer.safetensors")
CLOSE = 1e-3  # for losses in fp32 over sixteen steps; reordered sums differ by less
FAMILIES = tuple(TRAINERS.values())


@dataclasses.dataclass(frozen=True)
class Run:
    """A training run of a family's smallest configuration."""

    name: str
    images: int
    family: str = "ddpm"
    cpu: bool = False
    options: tuple[str, ...] = ()
    precision: str = "no"

    def words(self, context: Context) -> list[str]:
        """Return its command."""
        options = {
            "run.dir": context.scratch / "runs" / self.name, "data.shards": context.shards,
            "train.total_images": self.images, "train.log_every_images": 16,
            "train.save_every_images": 0, "train.mixed_precision": self.precision,
        }  # fmt: skip
        given = [*(f"{key}={value}" for key, value in options.items()), *self.options]
        config = f"--config=launch/configs/{self.family}_tiny.yaml"
        return [f"launch/train_{self.family}.py", config, *(f"--{option}" for option in given)]


class Runs:
    """Runs that checks share: each is trained once."""

    def __init__(self, context: Context, jobs: int, ends: float):
        """Train `jobs` at a time; none continues after `ends`, by time.monotonic()."""
        self.context, self.jobs, self.ends = context, jobs, ends
        self.pool = ThreadPoolExecutor(jobs)
        self.futures: dict[Run, Future[Path]] = {}
        self.folders: dict[Run, Path] = {}

    def start(self, run: Run) -> None:
        """Queue a run."""
        if run not in self.futures:
            self.futures[run] = self.pool.submit(self.train, run)

    def result(self, run: Run) -> Path:
        """Wait for a run and return its folder; one that was not queued is trained here."""
        if run in self.futures:
            return self.futures[run].result(max(1.0, self.ends - time.monotonic()))
        if run not in self.folders:
            self.folders[run] = self.train(run)
        return self.folders[run]

    def train(self, run: Run) -> Path:
        """Train a run, or continue it; return its folder."""
        log = self.context.scratch / f"{run.name}-{run.images}.txt"
        env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        env["NVIDIA_TF32_OVERRIDE"] = "0"  # losses are compared in fp32
        if run.cpu:
            env["CUDA_VISIBLE_DEVICES"] = ""
        if self.jobs > 1:
            env["OMP_NUM_THREADS"] = "2"  # else each uses all cores
        seconds = max(1.0, min(RUN_S, self.ends - time.monotonic()))
        run_limited([sys.executable, *run.words(self.context)], log, seconds, env)
        output = log.read_text()
        assert "runs uncompiled" not in output, output[output.index("runs uncompiled") :][:300]
        return self.context.scratch / "runs" / run.name

    def close(self) -> None:
        """Start no further runs."""
        self.pool.shutdown(wait=False, cancel_futures=True)


def losses(folder: Path) -> dict[tuple[int, str], float]:
    """Return the losses of a log, by images seen and name."""
    return {
        (row["images_seen"], key): value
        for row in read_metrics(folder / "metrics.jsonl")
        for key, value in row.items()
        if key.startswith("train/") and key.endswith("loss")
    }


def checksums(folder: Path) -> dict[str, str]:
    """Return the checksums of the newest checkpoint's tensors."""
    newest = max((folder / "checkpoints").iterdir())
    return {name: hashlib.sha256((newest / name).read_bytes()).hexdigest() for name in FILES}


def add_checks(runs: Runs, context: Context) -> Group:
    """Return the checks, and start their runs in the order in which they are needed."""
    group = Group()

    def add(
        name: str, work: Callable[..., str], *needed: Run, quick: bool = False,
        needs_gpu: bool = False, **options: Any,
    ) -> None:  # fmt: skip
        def check(context: Context) -> str:
            return work(runs, *needed, **options)

        group.check(name, 2 * RUN_S, quick=quick, needs_gpu=needs_gpu)(check)
        if (quick or not context.quick) and (context.gpu or not needs_gpu):
            for run in needed:
                runs.start(run)

    images = 256 if context.gpu else 64
    cpu = Run("cpu", images, cpu=True)
    # Without a GPU one run stands for all that are the same on a CPU.
    eager, whole = (Run("eager", images), Run("whole", images)) if context.gpu else (cpu, cpu)
    half = Run("half", images // 2)
    add("losses equal the CPU's", losses_are_close, eager, cpu, quick=True)
    # Without train.deterministic equal bytes are guaranteed on a CPU only.
    title, is_promised = "stopped and continued", not context.gpu
    add(f"{title}: same bytes", bytes_are_equal, whole, half, is_promised=is_promised, quick=True)
    pair = [
        dataclasses.replace(run, name=f"{run.name}1", options=("train.deterministic=true",))
        for run in (whole, half)
    ]
    name = f"{title} with train.deterministic: same bytes"
    add(name, bytes_are_equal, *pair, is_promised=True)
    for name, on_cpu in (("of the CPU continues", True), ("continues on the CPU", False)):
        start = Run(f"moved-{on_cpu}", images // 2, cpu=on_cpu) if context.gpu else half
        add(f"a checkpoint {name}", moved, start, cpu, quick=True)
    for name, option, needs_gpu in (
        ("compiled equals eager", "compile=all", False),
        ("graphs equal eager", "compile=graphs", True),
        ("images from the host equal those on the device", "images_on_device=false", False),
    ):
        run = Run(option, images, options=(f"train.{option}",))
        add(name, losses_are_close, run, eager, quick=needs_gpu, needs_gpu=needs_gpu)
    for family in FAMILIES[1:]:
        pair = [Run(f"{family}-{on_cpu}", 64, family, on_cpu) for on_cpu in (False, True)]
        # Adversarial training amplifies rounding errors.
        limit = 1e-2 if family == "gan" else CLOSE
        add(f"losses of {family} equal the CPU's", losses_are_close, *pair, limit=limit)
    for family in FAMILIES:
        run = Run(f"auto-{family}", 64, family, options=("train.compile=auto",), precision="auto")
        name = f"{family} trains and samples with compile and precision auto"
        add(name, has_samples, run, quick=family == "vae")
    return group


def losses_are_close(runs: Runs, made: Run, expected: Run, limit: float = CLOSE) -> str:
    """Compare losses over the steps that both runs have, relative to the expected ones."""
    ours, theirs = losses(runs.result(made)), losses(runs.result(expected))
    both = ours.keys() & theirs.keys()
    assert both, f"{made.name} and {expected.name} have no step in common"
    found = max(abs(ours[at] - theirs[at]) / max(abs(theirs[at]), 1e-6) for at in both)
    assert found < limit, f"losses are {found:.1e} apart"
    return f"{found:.1e} apart"


def bytes_are_equal(runs: Runs, whole: Run, half: Run, is_promised: bool) -> str:
    """Continue a run from halfway, and compare its checkpoint with an uninterrupted run's."""
    runs.result(half)
    folder = runs.result(dataclasses.replace(half, images=whole.images))
    same = checksums(folder) == checksums(runs.result(whole))
    assert same or not is_promised, "other bytes"
    return "same bytes" if same else "other bytes, which may happen without train.deterministic"


def moved(runs: Runs, half: Run, expected: Run) -> str:
    """Continue a run on the other device and compare its losses with an unmoved run's."""
    runs.result(half)
    cpu = runs.context.gpu and not half.cpu
    continued = dataclasses.replace(half, images=expected.images, cpu=cpu)
    return losses_are_close(runs, continued, expected)


def has_samples(runs: Runs, run: Run) -> str:
    """Return the number of sample grids and the last loss."""
    folder = runs.result(run)
    grids = list((folder / "samples").glob("*.png"))
    assert grids, "no samples"
    at, value = list(losses(folder).items())[-1]
    assert not math.isnan(value), f"{at[1]} is not a number"
    return f"{len(grids)} grids, {at[1]} {value:.3f}"
