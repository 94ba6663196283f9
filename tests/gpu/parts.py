"""What a session on a GPU does, the most valuable first, and how long each part may take."""

from __future__ import annotations

import concurrent.futures
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tests.gpu.processes import CommandError
from tests.gpu.schedule import Outcome, Part
from tests.gpu.session import Session

LAST_S = 14.0  # of a benchmark, for what follows its loops, and to be asked to end
START_S = 13.0  # before the first part: wheels, and what the machine is
RESERVE_S = 15.0  # for packing
GRAPHS = ("train.compile=graphs",)
FIRST = 3  # parts without which a session makes no sense


@dataclass(frozen=True)
class Sizes:
    """How large what is measured is."""

    channels: int
    precision: str
    batch: int  # of our rate and of the real training
    peers_batch: int
    small_batch: int  # where launches may bound the rate
    rounds: int
    steps: int
    repetitions: int  # of noising
    sample_steps: int
    per_class: int
    rate: float  # images/s to train by where none was measured
    options: tuple[str, ...] = ()  # of our net
    checks: tuple[str, ...] = ()  # for check.py


ON_GPU = Sizes(128, "bf16", 512, 256, 128, 3, 20, 100, 25, 10, 2000)
TINY = ("model.channel_mult=[1]", "model.num_blocks=[1]", "model.attention_at=[]")
DRY_RUN = Sizes(32, "no", 16, 16, 16, 1, 1, 2, 2, 1, 1, TINY, ("--quick",))


def make_parts(session: Session) -> list[Part]:
    """List the parts with their seconds: 560 in all, with the start and the reserve."""
    work = Work(session, DRY_RUN if session.dry_run else ON_GPU)
    small = work.sizes.small_batch
    eager = ["train.compile=none", "train.kernels=false"]
    return [
        Part("setup", 12, 10, work.set_up, essential=True),
        Part("together", 165, 60, work.together),
        Part("rate", 65, 30, work.rate),
        Part("noise", 20, 12, work.noise),
        Part("peers", 100, 40, work.peers, work.no_peers),
        Part("training", 95, 40, work.train),
        Part("graphs", 40, 25, lambda s: work.ours("graphs", small, s, GRAPHS), work.no_gpu),
        Part("eager", 35, 20, lambda s: work.ours("eager", small, s, eager)),
    ]


class Work:
    """The work of the parts; each gets its limit in seconds and returns what it found."""

    def __init__(self, session: Session, sizes: Sizes):
        """Keep where to work, and how large what is measured is."""
        self.session, self.sizes = session, sizes
        self._missing: list[str] | None = None  # peers, when it was looked for
        self.shapes, self.cifar = session.scratch / "shapes", session.scratch / "cifar"

    def no_gpu(self) -> str | None:
        """Say that a GPU is needed, where a dry run has none."""
        return "needs a GPU" if self.session.dry_run else None

    def no_peers(self) -> str | None:
        """Say which peer is not installed."""
        if self._missing is None:
            modules = "diffusers", "denoising_diffusion_pytorch"
            self._missing = [name for name in modules if not self.session.has(name)]
        return f"{', '.join(self._missing)} not installed" if self._missing else None

    def set_up(self, seconds: float) -> str:
        """Unpack what was prepared, and build the shards of the shapes."""
        start, session = time.monotonic(), self.session
        filled = session.unpack("triton.tar.gz", session.scratch / "triton")
        self._shards("shapes", self.shapes, seconds - (time.monotonic() - start))
        return f"shards of shapes, Triton's cache {'filled' if filled else 'empty'}"

    def together(self, seconds: float) -> str:
        """Check correctness, compile what is timed later and build shards, beside each other."""
        ends = time.monotonic() + seconds
        tasks: dict[str, Callable[[], str]] = {"checks": lambda: self._check(_until(ends))}
        if (self.session.prepared / "cifar.tar.gz").exists():
            tasks["shards of CIFAR"] = lambda: self._cifar(_until(ends))
        if not self.session.dry_run:  # which compiles nothing
            tasks["compiling the steps"] = lambda: self._compile_steps(ends)
            tasks["compiling the training"] = lambda: self._compile_training(ends)
        with concurrent.futures.ThreadPoolExecutor(len(tasks)) as pool:
            jobs = {name: pool.submit(self._one_of, name, task) for name, task in tasks.items()}
        failed = [name for name, job in jobs.items() if not job.result()]
        if failed:
            raise CommandError(f"{', '.join(failed)} failed")
        return ", ".join(tasks)

    def _one_of(self, name: str, task: Callable[[], str]) -> bool:
        start = time.monotonic()
        try:
            outcome = Outcome("done", task())
        except Exception as error:  # the others go on
            outcome = Outcome("failed", str(error))
        outcome.seconds = round(time.monotonic() - start, 1)
        self.session.report(name, outcome, packing=False)
        return outcome.state == "done"

    def _shards(self, source: str, folder: Path, seconds: float) -> None:
        words: list[str | Path] = [
            "-m",
            "shards.build",
            "--source",
            source,
            "--split",
            "train",
            "--out",
            folder,
        ]
        self.session.python(f"shards-{folder.name}", words, seconds)

    def _cifar(self, seconds: float) -> str:
        pictures = self.session.scratch / "pictures"
        start = time.monotonic()
        self.session.unpack("cifar.tar.gz", pictures)
        classes = next(path for path in sorted(pictures.rglob("train")) if path.is_dir())
        self._shards(f"folder:{classes.parent}", self.cifar, seconds - (time.monotonic() - start))
        return "built"

    def _check(self, seconds: float) -> str:
        session = self.session
        words: list[str | Path] = ["tests/gpu/check.py", session.pack_folder, self.shapes]
        words += ["--seconds", f"{seconds - 5:.0f}", "--scratch", session.scratch / "checks"]
        try:
            session.python("checks", [*words, *self.sizes.checks], seconds)
        finally:
            if (path := session.pack_folder / "checks.json").exists():
                found = json.loads(path.read_text())
                states = [one["state"] for one in found.values()]
                bad = [name for name, one in found.items() if one["state"] == "failed"]
                counts = {state: states.count(state) for state in ("passed", "failed", "skipped")}
                session.summary["checks"] = counts | {"failures": bad}
        return ", ".join(f"{count} {state}" for state, count in counts.items())

    def _compile_steps(self, ends: float) -> str:
        """Compile our steps: each batch that is timed, and nothing else."""
        sizes = self.sizes
        steps = [(sizes.batch, ()), (sizes.peers_batch, ()), (sizes.small_batch, GRAPHS)]

        def step(batch: int, options: Sequence[str]) -> None:
            self._step(f"compile-ours-{batch}", batch, _until(ends), options=options, brief=True)

        return _in_order({f"{b} {''.join(o)}".strip(): partial(step, b, o) for b, o in steps})

    def _compile_training(self, ends: float) -> str:
        """Compile our training with its sampling, and diffusers' step."""
        work: dict[str, Callable[[], Any]] = {
            "training": lambda: self._training(
                "compile-training", 3, _until(ends), self.session.scratch / "first", False
            )
        }
        batch, loops = self.sizes.peers_batch, ["--loops", "diffusers-compiled"]
        if self.no_peers() is None:
            work[f"diffusers at {batch}"] = lambda: self._step(
                f"compile-diffusers-{batch}", batch, _until(ends), loops, brief=True
            )
        return _in_order(work)

    def _step(
        self, name: str, batch: int, seconds: float, words: Sequence[str] = (),
        options: Sequence[str] = (), brief: bool = False,
    ) -> dict[str, Any]:  # fmt: skip
        sizes = self.sizes
        rounds, steps = (1, 1) if brief else (sizes.rounds, sizes.steps)
        given = [*sizes.options, *options]
        return self.session.benchmark(
            name,
            [
                "step", *words, "--batch", str(batch), "--channels", str(sizes.channels),
                "--precision", sizes.precision, "--rounds", str(rounds), "--steps", str(steps),
                "--shards", str(self.shapes), "--seconds", f"{max(1.0, seconds - LAST_S):.0f}",
                *(["--options", *given] if given else []),
            ],
            seconds,
        )  # fmt: skip

    def ours(self, name: str, batch: int, seconds: float, options: Sequence[str] = ()) -> str:
        """Measure our rate with some options."""
        found = self._step(f"{name}-{batch}", batch, seconds, options=options)
        loop = found["loops"]["ours"]
        rate = statistics.median(loop["images_per_s"])
        memory = loop["peak_gpu_gib"] or loop["peak_gib"]
        self.session.summary["figures"][f"{name}, images/s at {batch}"] = round(rate, 1)
        self.session.summary["figures"][f"{name}, GiB at {batch}"] = round(memory, 2)
        shares = found["profile"].get("shares", [])
        most = f"; most of it {shares[0][0][:40]} {100 * shares[0][1]:.0f} %" if shares else ""
        return f"{rate:,.0f} images/s at {batch}, {memory:.2f} GiB{most}"

    def rate(self, seconds: float) -> str:
        """Measure our rate as we train, with its memory and what a step is spent on."""
        return self.ours("ours", self.sizes.batch, seconds)

    def noise(self, seconds: float) -> str:
        """Compare the bandwidth of noising with a copy's."""
        words = ["noise", "--batch", str(self.sizes.batch), "--precision", self.sizes.precision]
        words += ["--repetitions", str(self.sizes.repetitions)]
        found = self.session.benchmark("noise", words, seconds)
        fraction = found["gb_per_s"] / found["copy_gb_per_s"]
        self.session.summary["figures"]["noising, of a copy's bandwidth"] = round(fraction, 3)
        return f"{found['gb_per_s']:,.0f} GB/s, {100 * fraction:.0f} % of a copy's"

    def peers(self, seconds: float) -> str:
        """Compare our rate with other people's loops."""
        batch = self.sizes.peers_batch
        found = self._step(f"peers-{batch}", batch, seconds, ["--peers"])
        rates = []
        for name, loop in found["loops"].items():
            if "failed" in loop:
                rates.append(f"{name} failed: {loop['failed'].strip().splitlines()[-1][:120]}")
                continue
            rate = statistics.median(loop["images_per_s"])
            self.session.summary["figures"][f"{name}, images/s at {batch}"] = round(rate, 1)
            rates.append(f"{name} {rate:,.0f}")
        return f"images/s at {batch}: {', '.join(rates)}"

    def train(self, seconds: float) -> str:
        """Train for as many images as fit into the time at the measured rate, and draw samples."""
        figures, batch = self.session.summary["figures"], self.sizes.batch
        rate = figures.get(f"ours, images/s at {batch}", self.sizes.rate)
        steps = 3 if self.session.dry_run else int(rate * max(10, seconds - 40) * 0.7 / batch)
        try:
            self._training("training", steps, seconds, self.session.training, True)
        finally:
            rows = self._note_training()
        return f"{rows[-1]['images_seen']:,} images, loss {rows[-1]['train/loss']:.4f}"

    def _note_training(self) -> list[dict[str, Any]]:
        """Note rate and waiting of the training so far; returns the lines of its log."""
        log, figures = self.session.training / "metrics.jsonl", self.session.summary["figures"]
        rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        later = rows[len(rows) // 3 :]  # the first ones wait for the compiler
        names = {"time/images_per_s": "images/s", "time/data_wait_s": "data wait in s of a log"}
        for key, title in names.items():
            if values := [row[key] for row in later if key in row]:
                figures[f"training, {title}"] = round(statistics.median(values), 4)
        return rows

    def _training(
        self, name: str, steps: int, seconds: float, folder: Path, pictures: bool
    ) -> None:
        sizes, images = self.sizes, steps * self.sizes.batch
        shards = self.cifar if (self.cifar / "index.json").exists() else self.shapes
        options = {
            "run.dir": folder, "data.shards": shards, "model.channels": sizes.channels,
            "train.global_batch": sizes.batch, "train.total_images": images,
            "train.mixed_precision": sizes.precision, "train.save_every_images": 0,
            "train.sample_every_images": images // 3 if pictures and steps >= 30 else 0,
            "train.samples_per_class": sizes.per_class, "sample.steps": sizes.sample_steps,
            "train.log_every_images": min(20, steps) * sizes.batch, "optim.decay": "cosine",
            "optim.warmup_images": images // 10, "train.ema_halflife_images": images // 20,
        }  # fmt: skip
        words = [f"--{key}={value}" for key, value in options.items()]
        words += [f"--{option}" for option in sizes.options]
        self.session.python(name, ["launch/train_ddpm.py", *words], seconds)


def _in_order(work: Mapping[str, Callable[[], Any]]) -> str:
    """Do what the time allows; raises CommandError where not even the first was done."""
    done: list[str] = []
    for name, do in work.items():
        try:
            do()
        except CommandError as error:
            if not done:
                raise
            return f"{', '.join(done)}; not {name}: {error}"
        done.append(name)
    return ", ".join(done)


def _until(ends: float) -> float:
    return max(1.0, ends - time.monotonic())
