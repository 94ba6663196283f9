"""The loop, for every family: restore; step until all images are seen; stop together."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dgm import images as pictures
from dgm.errors import UserError
from dgm.objective import Phase
from dgm.train import checkpoint
from dgm.train.batches import Batches
from dgm.train.ema import Ema
from dgm.train.engine import load_nets
from dgm.train.introduce import describe
from dgm.train.job import Job, check, compiled_parts
from dgm.train.optim import learning_rate
from dgm.train.run_folder import record_start
from dgm.train.sampling import sample_on_all
from dgm.train.stop import StopRequest
from dgm.train.tracking import (
    Meter,
    MetricsFile,
    Progress,
    log_images,
    peak_memory_gib,
    start_trackers,
)


def train(job: Job, open_folder: Callable[[], dict[str, list[Any]]]) -> bool:
    """Train until `total_images`, or until asked to stop; say whether the run is done.

    `open_folder` makes or checks the run folder and gives the keys that changed; it is called
    when the settings have been found to make sense, so that a mistake leaves no folder behind.
    """
    run = _Run(job)
    job.changed = job.engine.on_main(open_folder)
    return run.train()


class _Run:
    """A run in progress."""

    def __init__(self, job: Job):
        self.job, self.config, self.engine = job, job.config, job.engine
        check(job.config)
        engine = job.engine
        self.batches = Batches(
            job.data, job.seed, job.config.global_batch, job.config.micro_batch,
            engine.rank, engine.world_size, job.config.overfit_one_batch,
        )  # fmt: skip
        engine.prepare(job.nets, job.optim, compiled_parts(job.config)[1])
        self.ema = Ema(engine.bare, job.config.ema_halflife_images)
        self.meter = Meter()
        self.images_seen = self.step = 0
        self.wall_s = 0.0
        self.saved_at = -1
        # Where a step on the device went wrong, so that the host need not wait for each.
        self.first_bad = torch.full((), -1, dtype=torch.int64, device=engine.device)

    def train(self) -> bool:
        job, config, engine = self.job, self.config, self.engine
        self.restore()
        self.start_telling()
        stop = StopRequest()
        try:
            with torch.autograd.set_detect_anomaly(config.detect_anomaly), self.profiler() as trace:
                while self.images_seen < config.total_images:
                    for phase in job.objective.phases:
                        if self.step % phase.every == 0:
                            self.update(phase)
                    self.advance()
                    self.ema.update(engine.bare, self.images_seen, config.global_batch)
                    if self.due(config.log_every_images):
                        self.log()
                    if self.due(config.sample_every_images):
                        self.sample()
                    if self.due(config.save_every_images):
                        self.save()
                    if trace is not None:
                        trace.step()
                    if engine.agree(stop.raised):
                        break
            done = self.images_seen >= config.total_images
            self.finish(done)
            return done
        finally:
            stop.close()
            self.progress.close()

    def restore(self) -> None:
        """Go on from the newest whole checkpoint, if there is one."""
        folder = self.job.folder / "checkpoints"
        found = self.engine.on_main(lambda: _find(folder))
        if found is None:
            return
        loaded = checkpoint.read(found)
        state: dict[str, Any] = loaded.state
        if state["data_id"] != self.job.data_id:
            raise UserError(
                f"run.dir {self.job.folder} was trained on other images than data.shards holds now "
                f"(id {state['data_id']}, now {self.job.data_id}): use the same or another run.dir"
            )
        self.engine.load_full_state(loaded.full)
        load_nets(self.ema.nets, loaded.ema)
        self.images_seen, self.step = state["images_seen"], state["step"]
        self.wall_s, self.saved_at = state["wall_s"], self.images_seen
        self.meter.restore(state["meter"], self.engine)

    def start_telling(self) -> None:
        """Open the log, say what is about to run, start the trackers and the clock."""
        job, engine = self.job, self.engine
        self.metrics: MetricsFile | None = None
        if engine.is_main:
            lines = describe(engine, job.objective, job.image_shape, self.batches.micro_batch)
            for name, text in lines.items():
                print(f"{name + ':':17}{text}")
            if self.images_seen:
                print(f"{'continues at:':17}{self.images_seen:,} images")
            for key, (before, now) in job.changed.items():
                print(f"{'changed:':17}{key} from {before} to {now}")
            record_start(job.folder, engine, self.images_seen, job.changed)
            self.metrics = MetricsFile(job.folder / "metrics.jsonl", self.images_seen)
        start_trackers(engine, job.settings, self.step)
        self.progress = Progress(self.config.total_images, self.images_seen, engine.is_main)
        self.restart_clock(time.monotonic())

    def restart_clock(self, now: float) -> None:
        """Count images, pauses and waiting from here."""
        self.mark, self.mark_images = now, self.images_seen
        self.paused_s = self.data_wait_s = 0.0

    def update(self, phase: Phase) -> None:
        """Take one optimizer step of a phase over all micro-batches."""
        engine, count = self.engine, self.batches.num_micro
        stream = self.batches.step(self.images_seen, engine.device)
        with engine.learning(phase.net) as nets:
            for k in range(count):
                began = time.monotonic()
                batch, draws = next(stream)
                self.data_wait_s += time.monotonic() - began

                def loss(batch=batch, draws=draws) -> Tensor:
                    with engine.autocast():
                        values = self.job.objective.loss(nets, batch, phase, draws)
                    for name, value in values.items():
                        self.meter.add(self.metric(phase, name), value)
                    return values["loss"] / count

                engine.backward(phase.net, loss, last=k == count - 1)
        norm = engine.clip(phase.net, self.job.optim.clip_norm)
        self.meter.add(self.metric(phase, "grad_norm"), norm)
        self.refuse_non_finite(norm, phase)
        seen = self.images_seen + self.config.global_batch
        engine.update(phase.net, learning_rate(self.job.optim, seen, self.config.total_images))

    def metric(self, phase: Phase, name: str) -> str:
        """Name a value; the phase shows only where there are several."""
        alone = len(self.job.objective.phases) == 1
        return f"train/{name}" if alone else f"train/{phase.name}/{name}"

    def advance(self) -> None:
        self.images_seen += self.config.global_batch
        self.step += 1
        self.progress.advance(min(self.images_seen, self.config.total_images))

    def due(self, every: int) -> bool:
        """Say whether a multiple of `every` images was crossed in this step."""
        before = self.images_seen - self.config.global_batch
        return every > 0 and self.images_seen // every > before // every

    def refuse_non_finite(self, norm: Tensor, phase: Phase) -> None:
        """Stop before an update with a gradient that is not finite.

        On a GPU the host would have to wait for the number, so the device notes the step and
        `check_noted` finds it before anything is logged or saved.
        """
        bad = ~torch.isfinite(norm)
        if self.engine.device.type == "cpu":
            if bool(bad):
                raise _not_finite(self.step, self.images_seen, phase.name)
        else:
            first = bad & (self.first_bad < 0)
            self.first_bad = torch.where(first, self.step, self.first_bad)

    def check_noted(self) -> None:
        """Raise UserError if the device noted a gradient that was not finite."""
        step = int(self.first_bad)
        if step >= 0:
            raise _not_finite(step, step * self.config.global_batch, "one of the phases")

    def log(self) -> None:
        """Write the means since the last log."""
        self.check_noted()
        means = self.meter.means(self.engine)
        now = time.monotonic()
        spent = now - self.mark - self.paused_s
        self.wall_s += now - self.mark
        line = {
            "step": self.step,
            "images_seen": self.images_seen,
            "wall_s": round(self.wall_s, 3),
            **means,
            "train/lr": learning_rate(self.job.optim, self.images_seen, self.config.total_images),
            "time/images_per_s": round((self.images_seen - self.mark_images) / spent, 2),
            "time/data_wait_s": round(self.data_wait_s, 4),
            "memory/peak_gib": round(peak_memory_gib(self.engine.device), 3),
        }
        self.restart_clock(now)
        if self.metrics is not None:
            self.metrics.write(line)
        values = {k: v for k, v in line.items() if "/" in k}
        self.engine.accelerator.log(values, step=self.step)
        self.progress.say(means.get("train/loss", float("nan")))

    def sample(self) -> None:
        """Draw a grid, a row for each class, from the averaged weights; each process a part."""
        with self.pause():
            engine, columns = self.engine, self.config.samples_per_class
            index = torch.arange(columns * len(self.job.classes))
            made = sample_on_all(
                engine, self.job.objective, self.ema.nets, index, index // columns, self.job.seed
            )
            if engine.is_main:
                sheet = pictures.grid(pictures.to_uint8(made), columns)
                path = self.job.folder / "samples" / f"{self.images_seen:09d}.png"
                pictures.save_png(path, sheet)
                log_images(engine, "samples", sheet, self.step)

    def save(self) -> None:
        """Write a checkpoint; the log reaches the disk before it."""
        if self.saved_at == self.images_seen:
            return
        self.check_noted()
        with self.pause():
            full, meter = self.engine.full_state(), self.meter.state(self.engine)
            if self.metrics is not None:
                self.metrics.sync()
            state = {
                "images_seen": self.images_seen,
                "step": self.step,
                "wall_s": self.wall_s + time.monotonic() - self.mark,
                "meter": meter,
                "data_id": self.job.data_id,
                "image_shape": list(self.job.image_shape),
                "classes": list(self.job.classes),
            }
            ema = {
                f"{n}.{k}": v for n, m in self.ema.nets.items() for k, v in m.state_dict().items()
            }
            whole = checkpoint.Checkpoint(full, ema, state)
            folder = self.job.folder / "checkpoints"
            keep = self.config.keep_checkpoints
            self.engine.on_main(
                lambda: str(checkpoint.write(folder, self.images_seen, whole, keep))
            )
            self.saved_at = self.images_seen

    def finish(self, done: bool) -> None:
        """Leave everything on the disk."""
        if done and self.meter.sums:
            self.log()
        last_grid = self.job.folder / "samples" / f"{self.images_seen:09d}.png"
        if done and not self.engine.on_main(last_grid.exists):
            self.sample()
        self.save()

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Keep what is not training out of images/s."""
        began = time.monotonic()
        yield
        self.paused_s += time.monotonic() - began

    def profiler(self) -> Any:
        """Make a profiler of some steps after two, or nothing."""
        steps = self.config.profile_steps
        if steps <= 0 or not self.engine.is_main:
            return contextlib.nullcontext()
        folder = self.job.folder / "profile"
        return torch.profiler.profile(
            schedule=torch.profiler.schedule(wait=1, warmup=1, active=steps, repeat=1),
            on_trace_ready=torch.profiler.tensorboard_trace_handler(str(folder)),
        )


def _find(folder: Path) -> Path | None:
    checkpoint.remove_partial(folder)
    return checkpoint.newest(folder, set_aside=True)


def _not_finite(step: int, images_seen: int, phase: str) -> UserError:
    return UserError(
        f"the gradient of {phase} is not finite at step {step} (after {images_seen} images): "
        "lower optim.lr, or set optim.clip_norm; the checkpoints before it are whole"
    )
