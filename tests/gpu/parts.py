"""The parts of a session on a GPU, the most valuable first, and how long each may take."""

from __future__ import annotations

import concurrent.futures
import functools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.gpu.processes import CommandError
from tests.gpu.schedule import Part, timed
from tests.gpu.session import Session

LAST_S = 14.0  # at the end of a benchmark: for the profile after its loops, and GRACE_S
START_S = 13.0  # before the first part: wheels, and checks of the machine
RESERVE_S = 15.0  # for packing the results
FIRST = 3  # parts without which a session is of no use
GRAPHS = ("train.compile=graphs",)
EAGER = ("train.compile=none", "train.kernels=false")


@dataclass(frozen=True)
class Sizes:
    """Sizes of what is measured."""

    channels: int
    precision: str
    batch: int  # batch size of our rate and of the training run
    peers_batch: int
    small_batch: int  # batch size at which launches may bound the rate
    rounds: int
    steps: int
    repetitions: int  # timings of noising
    sample_steps: int
    per_class: int
    rate: float  # images/s that the training run assumes if none was measured
    options: tuple[str, ...] = ()  # options of our net
    checks: tuple[str, ...] = ()  # options of check.py


ON_GPU = Sizes(128, "bf16", 512, 256, 128, 3, 20, 100, 25, 10, 2000)
TINY = (
    "train.compile=none",
    "model.channel_mult=[1]",
    "model.num_blocks=[1]",
    "model.attention_at=[]",
)
DRY_RUN = Sizes(32, "no", 16, 16, 16, 1, 1, 2, 2, 1, 1, TINY, ("--quick",))


def make_parts(session: Session) -> list[Part]:
    """Return the parts with their seconds: 560 in all, with START_S and RESERVE_S."""
    work = Work(session, DRY_RUN if session.dry_run else ON_GPU)
    batch, small = work.sizes.batch, work.sizes.small_batch
    no_gpu = "needs a GPU" if session.dry_run else None
    return [
        Part("setup", 12, 10, work.set_up, essential=True),
        Part("together", 165, 60, work.together),
        Part("rate", 65, 30, lambda s: work.ours("ours", batch, s)),
        Part("noise", 20, 12, work.noise),
        Part("peers", 100, 40, work.peers, lambda: work.no_peers),
        Part("training", 95, 40, work.train),
        Part("graphs", 40, 25, lambda s: work.ours("graphs", small, s, GRAPHS), lambda: no_gpu),
        Part("eager", 35, 20, lambda s: work.ours("eager", small, s, EAGER)),
    ]


class Work:
    """The work of the parts: each gets its limit in seconds and returns its results in a line."""

    def __init__(self, session: Session, sizes: Sizes):
        self.session, self.sizes = session, sizes
        self.figures: dict[str, float] = session.summary["figures"]
        self.shapes, self.cifar = session.scratch / "shapes", session.scratch / "cifar"

    @functools.cached_property
    def no_peers(self) -> str | None:
        """Return which peers are not installed; None if both are."""
        try:
            missing = self.session.missing("peers", ["diffusers", "denoising_diffusion_pytorch"])
        except CommandError as error:
            return str(error)
        return f"{', '.join(missing)} not installed" if missing else None

    def set_up(self, seconds: float) -> str:
        """Unpack the kernel cache, and build the shards of the built-in shapes."""
        ends = time.monotonic() + seconds
        filled = self.session.unpack("triton.tar.gz", self.session.scratch / "triton")
        self._build_shards("shapes", self.shapes, ends)
        return f"shards of shapes, Triton's cache {'filled' if filled else 'empty'}"

    def together(self, seconds: float) -> str:
        """Check correctness, compile what is timed later and build shards, in parallel."""
        ends = time.monotonic() + seconds
        tasks: dict[str, Callable[[float], str]] = {"checks": self._check}
        if (self.session.prepared / "cifar.tar.gz").exists():
            tasks["shards of CIFAR"] = self._build_cifar
        if not self.session.dry_run:  # a dry run compiles nothing
            tasks["compiling the steps"] = self._compile_steps
            tasks["compiling the training"] = self._compile_training

        def run(name: str) -> bool:
            outcome = timed(lambda: tasks[name](ends))
            self.session.report(name, outcome, packing=False)
            return outcome.state == "done"

        with concurrent.futures.ThreadPoolExecutor(len(tasks)) as pool:
            succeeded = dict(zip(tasks, pool.map(run, tasks), strict=True))
        if failed := [name for name in tasks if not succeeded[name]]:
            raise CommandError(f"{', '.join(failed)} failed")
        return ", ".join(tasks)

    def _build_shards(self, source: str, folder: Path, ends: float) -> None:
        words = ["-m", "shards.build", f"--source={source}", "--split=train", f"--out={folder}"]
        self.session.python(f"shards-{folder.name}", words, _until(ends))

    def _build_cifar(self, ends: float) -> str:
        pictures = self.session.scratch / "pictures"
        self.session.unpack("cifar.tar.gz", pictures)
        classes = next(path for path in sorted(pictures.rglob("train")) if path.is_dir())
        self._build_shards(f"folder:{classes.parent}", self.cifar, ends)
        return "built"

    def _check(self, ends: float) -> str:
        session, seconds = self.session, _until(ends)
        words: list[str | Path] = ["tests/gpu/check.py", session.pack_folder, self.shapes]
        words += ["--seconds", f"{seconds - 5:.0f}", "--scratch", session.scratch / "checks"]
        counts: dict[str, int] = {}
        try:
            session.python("checks", [*words, *self.sizes.checks], seconds)
        finally:
            if (path := session.pack_folder / "checks.json").exists():
                found = json.loads(path.read_text())
                states = [each["state"] for each in found.values()]
                counts |= {state: states.count(state) for state in ("passed", "failed", "skipped")}
                failures = [name for name, each in found.items() if each["state"] == "failed"]
                session.summary["checks"] = counts | {"failures": failures}
        return ", ".join(f"{count} {state}" for state, count in counts.items())

    def _compile_steps(self, ends: float) -> str:
        """Compile each of our steps that is timed later."""
        sizes = self.sizes
        steps = [(sizes.batch, ()), (sizes.peers_batch, ()), (sizes.small_batch, GRAPHS)]

        def compile_step(batch: int, options: Sequence[str]) -> str:
            name = f"compile-ours-{batch}"
            self._step(name, batch, _until(ends), options=options, compile_only=True)
            return " ".join([str(batch), *options])

        return _in_order([functools.partial(compile_step, *step) for step in steps])

    def _compile_training(self, ends: float) -> str:
        """Compile our training run with its sampling, and diffusers' step."""
        batch = self.sizes.peers_batch

        def compile_ours() -> str:
            folder = self.session.scratch / "first"
            self._training("compile-training", 3, _until(ends), folder, samples=False)
            return "training"

        def compile_diffusers() -> str:
            words = ["--loops", "diffusers-compiled"]
            name = f"compile-diffusers-{batch}"
            self._step(name, batch, _until(ends), words, compile_only=True)
            return f"diffusers at {batch}"

        return _in_order([compile_ours, *([] if self.no_peers else [compile_diffusers])])

    def _step(
        self, name: str, batch: int, seconds: float, words: Sequence[str] = (),
        options: Sequence[str] = (), compile_only: bool = False,
    ) -> dict[str, Any]:  # fmt: skip
        sizes = self.sizes
        rounds, steps = (1, 1) if compile_only else (sizes.rounds, sizes.steps)
        options = [*sizes.options, *options]
        return self.session.benchmark(
            name,
            [
                "step", *words, f"--batch={batch}", f"--channels={sizes.channels}",
                f"--precision={sizes.precision}", f"--rounds={rounds}", f"--steps={steps}",
                f"--shards={self.shapes}", f"--seconds={max(1.0, seconds - LAST_S):.0f}",
                *(["--options", *options] if options else []),
            ],
            seconds,
        )  # fmt: skip

    def ours(self, name: str, batch: int, seconds: float, options: Sequence[str] = ()) -> str:
        """Measure our rate, memory and longest operation with some options."""
        found = self._step(f"{name}-{batch}", batch, seconds, options=options)
        loop = found["loops"]["ours"]
        rate = statistics.median(loop["images_per_s"])
        memory = loop["peak_gpu_gib"] or loop["peak_gib"]
        self.figures[f"{name}, images/s at {batch}"] = round(rate, 1)
        self.figures[f"{name}, GiB at {batch}"] = round(memory, 2)
        shares = found["profile"].get("fractions", [])
        longest = f"; longest {shares[0][0][:40]} {100 * shares[0][1]:.0f} %" if shares else ""
        return f"{rate:,.0f} images/s at {batch}, {memory:.2f} GiB{longest}"

    def noise(self, seconds: float) -> str:
        """Compare the bandwidth of noising with a copy's."""
        sizes = self.sizes
        words = ["noise", f"--batch={sizes.batch}", f"--precision={sizes.precision}"]
        words += [f"--repetitions={sizes.repetitions}"]
        found = self.session.benchmark("noise", words, seconds)
        fraction = found["gb_per_s"] / found["copy_gb_per_s"]
        self.figures["noising, fraction of a copy's bandwidth"] = round(fraction, 3)
        return f"{found['gb_per_s']:,.0f} GB/s, {100 * fraction:.0f} % of a copy's"

    def peers(self, seconds: float) -> str:
        """Compare our rate with that of peers' loops."""
        batch = self.sizes.peers_batch
        found = self._step(f"peers-{batch}", batch, seconds, ["--peers"])
        rates = []
        for name, loop in found["loops"].items():
            if "failed" in loop:
                rates.append(f"{name} failed: {loop['failed'].strip().splitlines()[-1][:120]}")
                continue
            rate = statistics.median(loop["images_per_s"])
            self.figures[f"{name}, images/s at {batch}"] = round(rate, 1)
            rates.append(f"{name} {rate:,.0f}")
        return f"images/s at {batch}: {', '.join(rates)}"

    def train(self, seconds: float) -> str:
        """Train for as many images as fit into the time at the measured rate, and draw samples."""
        rate = self.figures.get(f"ours, images/s at {self.sizes.batch}", self.sizes.rate)
        steps = int(rate * max(10, seconds - 40) * 0.7 / self.sizes.batch)
        if self.session.dry_run:
            steps = 3
        folder = self.session.training
        try:
            self._training("training", steps, seconds, folder, samples=True)
        finally:
            log = folder / "metrics.jsonl"
            lines = log.read_text().splitlines() if log.exists() else []
            rows = [json.loads(line) for line in lines]
            later = rows[len(rows) // 3 :]  # the first ones wait for the compiler
            names = {"time/images_per_s": "images/s", "time/data_wait_s": "data wait in s of a log"}
            for key, title in names.items():
                if values := [row[key] for row in later if key in row]:
                    self.figures[f"training, {title}"] = round(statistics.median(values), 4)
        return f"{rows[-1]['images_seen']:,} images, loss {rows[-1]['train/loss']:.4f}"

    def _training(self, name: str, steps: int, seconds: float, folder: Path, samples: bool) -> None:
        sizes, images = self.sizes, steps * self.sizes.batch
        shards = self.cifar if (self.cifar / "index.json").exists() else self.shapes
        options = {
            "run.dir": folder, "data.shards": shards, "model.channels": sizes.channels,
            "train.global_batch": sizes.batch, "train.total_images": images,
            "train.mixed_precision": sizes.precision, "train.save_every_images": 0,
            "train.sample_every_images": images // 3 if samples and steps >= 30 else 0,
            "train.samples_per_class": sizes.per_class, "sample.steps": sizes.sample_steps,
            "train.log_every_images": min(20, steps) * sizes.batch, "optim.decay": "cosine",
            "optim.warmup_images": images // 10, "train.ema_halflife_images": images // 20,
        }  # fmt: skip
        words = [f"--{key}={value}" for key, value in options.items()]
        words += [f"--{option}" for option in sizes.options]
        self.session.python(name, ["launch/train_ddpm.py", *words], seconds)


def _in_order(tasks: Sequence[Callable[[], str]]) -> str:
    """Run the tasks that fit into their time; raise CommandError if not even the first did."""
    done: list[str] = []
    for task in tasks:
        try:
            done.append(task())
        except CommandError as error:
            if not done:
                raise
            return f"{', '.join(done)}; then: {error}"
    return ", ".join(done)


def _until(ends: float) -> float:
    return max(1.0, ends - time.monotonic())
