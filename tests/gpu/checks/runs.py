"""Whole training runs, each a process of its own and beside each other, compared afterwards."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from tests.gpu.checks.registry import Context, Group
from tests.gpu.processes import run_command

GROUP = Group()
ROOT = Path(__file__).resolve().parents[3]
RUN_S = 120.0  # of one training run, at most
IMAGES, HALF = 256, 128
FILES = ("model.safetensors", "ema.safetensors", "optimizer.safetensors")
CLOSE = 1e-3  # for losses in fp32 over sixteen steps; reordered sums differ by less
FAMILIES = ("ddpm", "vae", "flow", "gan")


@dataclasses.dataclass(frozen=True)
class Run:
    """A training run of a family's smallest configuration, in fp32 unless it says otherwise."""

    name: str
    family: str = "ddpm"
    images: int = IMAGES
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
        config = f"launch/configs/{self.family}_tiny.yaml"
        words = [f"launch/train_{self.family}.py", "--config", config]
        words += [f"--{key}={value}" for key, value in options.items()]
        return [*words, *(f"--{option}" for option in self.options)]


class Runs:
    """Runs that several checks ask for: each is made once, some beside each other."""

    def __init__(self, context: Context, jobs: int, ends: float):
        """Take `jobs` processes at a time; none outlives `ends`, by time.monotonic()."""
        self.context, self.jobs, self.ends = context, jobs, ends
        self.pool = concurrent.futures.ThreadPoolExecutor(jobs)
        self.asked = concurrent.futures.ThreadPoolExecutor(1)  # for those that somebody waits for
        self.futures: dict[Run, concurrent.futures.Future[Path]] = {}
        self.lock = threading.Lock()

    def start(self, runs: Sequence[Run]) -> None:
        """Begin runs before they are asked for, where several processes may run."""
        if self.jobs > 1:
            for run in runs:
                self._submit(run, self.pool)

    def _submit(self, run: Run, pool: concurrent.futures.ThreadPoolExecutor) -> None:
        with self.lock:
            if run not in self.futures:
                self.futures[run] = pool.submit(self.train, run)

    def result(self, run: Run) -> Path:
        """Wait for a run and return its folder."""
        self._submit(run, self.asked)
        return self.futures[run].result(self._limit())

    def _limit(self) -> float:
        return max(1.0, min(RUN_S, self.ends - time.monotonic()))

    def train(self, run: Run) -> Path:
        """Train a run, or continue it; returns its folder."""
        context = self.context
        folder = context.scratch / "runs" / run.name
        log = context.scratch / f"{run.name}-{run.images}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        env["NVIDIA_TF32_OVERRIDE"] = "0"  # losses are compared in fp32
        if run.cpu:
            env["CUDA_VISIBLE_DEVICES"] = ""
        if self.jobs > 1:
            env["OMP_NUM_THREADS"] = "2"  # else each takes all cores from the others
        run_command([sys.executable, *run.words(context)], log, self._limit(), env, ROOT)
        output = log.read_text()
        assert "runs uncompiled" not in output, output[output.index("runs uncompiled") :][:300]
        return folder

    def close(self) -> None:
        """Start no more."""
        for pool in (self.pool, self.asked):
            pool.shutdown(wait=False, cancel_futures=True)


CPU, EAGER = Run("cpu", cpu=True), Run("eager")
COMPILED = Run("compiled", options=("train.compile=all",))
GRAPHS = Run("graphs", options=("train.compile=graphs",))
FROM_HOST = Run("from-host", options=("train.images_on_device=false",))
DETERMINISTIC = ("train.deterministic=true",)
TO_GPU, TO_CPU = Run("to-gpu", images=HALF, cpu=True), Run("to-cpu", images=HALF)


def family_pair(family: str) -> tuple[Run, Run]:
    """Return four steps of a family, on the device and on the CPU."""
    runs = (Run(f"{family}-{place}", family, 64, place == "cpu") for place in ("device", "cpu"))
    device, cpu = runs
    return device, cpu


def resumed(name: str, options: tuple[str, ...]) -> tuple[Run, Run]:
    """Return a run in one go, and the first half of one that is to be continued."""
    return Run(f"{name}-whole", options=options), Run(f"{name}-half", images=HALF, options=options)


def auto(family: str) -> Run:
    """Return a family's run as it is configured by default on this machine."""
    return Run(f"auto-{family}", family, 64, options=("train.compile=auto",), precision="auto")


def losses(folder: Path) -> dict[tuple[int, str], float]:
    """Read the losses of a log, by images seen and name."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        (row["images_seen"], key): value
        for row in rows
        for key, value in row.items()
        if key.startswith("train/") and key.endswith("loss")
    }


def furthest(made: Path, expected: Path) -> float:
    """Return the largest relative difference of two runs' losses over the steps that both have."""
    ours, theirs = losses(made), losses(expected)
    both = ours.keys() & theirs.keys()
    assert both, f"{made.name} and {expected.name} have no step in common"
    return max(abs(ours[at] - theirs[at]) / max(abs(theirs[at]), 1e-6) for at in both)


def checksums(folder: Path) -> dict[str, str]:
    """Return the checksums of the newest checkpoint's tensors."""
    newest = max((folder / "checkpoints").iterdir())
    return {name: hashlib.sha256((newest / name).read_bytes()).hexdigest() for name in FILES}


class Comparisons:
    """The checks, which share runs."""

    def __init__(self, runs: Runs, context: Context):
        """Compare `runs`."""
        self.runs, self.context = runs, context

    def close(self, made: Run, expected: Run, limit: float = CLOSE) -> str:
        """Compare losses."""
        found = furthest(self.runs.result(made), self.runs.result(expected))
        assert found < limit, f"losses are {found:.1e} apart"
        return f"{found:.1e} apart"

    def moved(self, half: Run, expected: Run) -> str:
        """Continue a run on the other device and compare its losses with an unmoved run's."""
        self.runs.result(half)
        continued = dataclasses.replace(half, images=IMAGES, cpu=not half.cpu)
        return self.close(continued, expected)

    def same_bytes(self, name: str, options: tuple[str, ...]) -> bool:
        """Return whether a run that was stopped and continued ends with the same bytes."""
        whole, half = resumed(name, options)
        self.runs.result(half)
        folder = self.runs.result(dataclasses.replace(half, images=IMAGES))
        return checksums(folder) == checksums(self.runs.result(whole))


def add_checks(runs: Runs, context: Context) -> Group:
    """Return the checks, and start their runs in the order in which they are asked for."""
    group, compare = Group(), Comparisons(runs, context)
    needed: dict[str, list[Run]] = {}

    def add(name: str, work: object, need: list[Run], **how: bool) -> None:
        needed[name] = need
        group.check(name, 2 * RUN_S, **how)(work)  # type: ignore[arg-type]

    add("losses are the CPU's", lambda c: compare.close(EAGER, CPU), [EAGER, CPU], quick=True)
    add(
        "stopped and continued: same bytes", lambda c: free(compare), [*resumed("free", ())],
        quick=True,
    )  # fmt: skip
    add(
        "stopped and continued with train.deterministic: same bytes",
        lambda c: deterministic(compare),
        [*resumed("deterministic", DETERMINISTIC)],
    )
    add("a checkpoint of the CPU continues", lambda c: compare.moved(TO_GPU, CPU), [TO_GPU])
    add("a checkpoint continues on the CPU", lambda c: compare.moved(TO_CPU, CPU), [TO_CPU])
    add("compiled is eager", lambda c: compare.close(COMPILED, EAGER), [COMPILED])
    add("graphs are eager", lambda c: compare.close(GRAPHS, EAGER), [GRAPHS], needs_gpu=True)
    add(
        "images from the host are those on the device",
        lambda c: compare.close(FROM_HOST, EAGER), [FROM_HOST],
    )  # fmt: skip
    for family in FAMILIES[1:]:
        pair = family_pair(family)
        # Adversarial training amplifies rounding errors.
        limit = 1e-2 if family == "gan" else CLOSE
        add(
            f"losses of {family} are the CPU's",
            lambda c, pair=pair, limit=limit: compare.close(pair[0], pair[1], limit), [*pair],
        )  # fmt: skip
    for family in FAMILIES:
        run = auto(family)
        add(f"{family} trains and samples on auto", lambda c, run=run: sampled(runs, run), [run])
    for check in group.chosen(context):
        if context.gpu or not check.needs_gpu:
            runs.start(needed[check.name])
    return group


def free(compare: Comparisons) -> str:
    """Resume without train.deterministic, which is a promise on a CPU only."""
    same = compare.same_bytes("free", ())
    assert same or compare.context.gpu, "other bytes"
    return "same bytes" if same else "other bytes, as may be without train.deterministic"


def deterministic(compare: Comparisons) -> str:
    """Resume with train.deterministic."""
    assert compare.same_bytes("deterministic", DETERMINISTIC), "other bytes"
    return "same bytes"


def sampled(runs: Runs, run: Run) -> str:
    """Return what a run leaves of samples and its last loss."""
    start = time.monotonic()
    folder = runs.result(run)
    pictures = list((folder / "samples").glob("*.png"))
    assert pictures, "no samples"
    at, value = list(losses(folder).items())[-1]
    assert value == value, f"{at[1]} is not a number"
    return f"{len(pictures)} sheets, {at[1]} {value:.3f}, waited {time.monotonic() - start:.0f} s"
