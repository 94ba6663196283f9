"""The loop, for every family: restore; step until all images are seen; stop together."""

from __future__ import annotations

import functools
import math
import warnings
from typing import Any

import numpy as np
import torch

from dgm.common.errors import UserError
from dgm.objective import InitializedByData, Phase
from dgm.training import checkpoint
from dgm.training.cuda_graph import StepNumbers, step_graphs
from dgm.training.ema import Ema
from dgm.training.energy import EnergyMeter, find_counters
from dgm.training.finite_check import FiniteWatch
from dgm.training.job import Job, check, check_micro_batches, fit_out, with_kernels
from dgm.training.metrics_log import Clock, Meter, Progress, make_profiler, peak_memory_gib
from dgm.training.oom import fitting
from dgm.training.optimizer import learning_rate
from dgm.training.run_folder import RunFolder
from dgm.training.run_logger import Journal
from dgm.training.sampler import Batches
from dgm.training.sampling import draw_sheets
from dgm.training.state_dicts import load_nets
from dgm.training.stop_request import StopRequest
from dgm.training.train_step import StepOutput, TrainStep


def train(job: Job, folder: RunFolder, stop: StopRequest | None = None) -> bool:
    """Train until `total_images`, or until asked to stop; return whether the run is done.

    The folder is made when the settings have been found to make sense, its configuration written
    when the newest checkpoint has been found to fit: a mistake leaves no folder and no trace.
    """
    run = Run(job)
    job.changed = job.engine.on_main(folder.open)
    own = stop or StopRequest()
    try:
        return run.train(own, folder)
    except UserError:
        if job.engine.is_main and run.images_seen == run.images_seen_at_start:
            folder.discard()
        raise
    finally:
        if stop is None:
            own.close()


class Run:
    """A run in progress: `restore`, `start_telling`, then `go_on` until all images are seen."""

    def __init__(self, job: Job):
        self.job, self.config, self.engine = job, job.config, job.engine
        check(job.config, job.engine.asked)
        engine = job.engine
        self.batches = Batches(
            job.data, job.seed, job.config.global_batch, job.config.micro_batch,
            engine.rank, engine.world_size, job.config.overfit_one_batch,
            job.config.images_on_device,
        )  # fmt: skip
        check_micro_batches(job.objective, self.batches)
        self.prepare()
        averaged = {phase.net for phase in job.objective.phases if phase.average}
        first = {name: net for name, net in engine.copies().items() if name in averaged}
        self.ema = Ema(first, job.config.ema_halflife_images)
        self.meter = Meter()
        self.watch = FiniteWatch(engine, job.objective, self.batches, engine.host_knows_norms)
        self.train_step = TrainStep(engine, job.objective, self.watch, self.batches.num_micro)
        self.graphs = step_graphs(job.config, self.train_step, self.batches)
        self.images_seen = self.images_seen_at_start = self.step = 0
        self.wall_s = 0.0
        self.energy = EnergyMeter(find_counters(engine.device) if engine.is_main else {})
        self.saved_at = -1
        self.stop: StopRequest | None = None
        self.measured: dict[str, float] = {}  # by the job's evaluation, not yet in the log
        self.best: dict[str, Any] | None = None  # the best of what it measured so far

    def prepare(self) -> None:
        """Hand the nets to the engine, which spreads their first weights over the processes."""
        job, engine = self.job, self.engine
        if isinstance(job.objective, InitializedByData):
            nets = {name: net.to(engine.device) for name, net in job.nets.items()}
            with torch.no_grad():
                job.objective.initialize(nets, *self.batches.first_images(256, engine.device))
        fit_out(job.nets, job.config, engine.asked, engine.device)
        engine.prepare(job.nets, job.optim, with_kernels(job.config))

    def train(self, stop: StopRequest, folder: RunFolder | None = None) -> bool:
        """Train until all images are seen or a stop is asked for; say whether the run is done."""
        job, config, engine = self.job, self.config, self.engine
        self.stop = stop
        job.watchdog.doing("start")
        self.restore()
        if folder is not None:
            engine.on_main(folder.write_config)
        self.start_telling()
        if engine.world_size > 1:
            stop.only_note()  # else one might end as another has begun
        steps = config.profile_steps if engine.is_main else 0
        profiler = make_profiler(job.folder / "profile", steps)
        try:
            with torch.autograd.set_detect_anomaly(config.detect_anomaly), profiler as trace:
                while self.images_seen < config.total_images:
                    self.go_on()
                    if trace is not None:
                        trace.step()
                    if engine.agree(stop.raised):
                        break
            done = self.images_seen >= config.total_images
            self.finish(done)
            return done
        finally:
            stop.only_note()
            job.watchdog.doing("save")
            self.progress.close()

    def go_on(self) -> None:
        """Take a step, and do what is due after it."""
        job, config, engine = self.job, self.config, self.engine
        every = config.cadences
        along: dict[str, bool] = {}
        for number, phase in enumerate(job.objective.phases):
            if self.step % phase.every == 0:
                along[phase.net] = fitting(
                    functools.partial(self.update, phase, number),
                    engine, job.objective, self.batches, job.image_shape,
                )  # fmt: skip
        self.advance()
        with engine.whole() as nets:
            self.ema.update(nets, self.images_seen, config.global_batch, along)
        improved = self.due(job.eval_every_images) and self.evaluate()
        if self.due(every.log) or self.measured:
            self.log()
        if self.due(every.sample):
            self.sample()
        if self.due(every.save) or improved:
            self.save()

    def restore(self) -> None:
        """Go on from the newest whole checkpoint, if there is one."""
        folder = self.job.folder / "checkpoints"
        found = self.engine.on_main(lambda: checkpoint.take_over(folder, self.check_data))
        if found is None:
            return
        loaded = checkpoint.read(found)
        state: dict[str, Any] = loaded.state
        self.engine.load_full_state(loaded.full)
        load_nets(self.ema.nets, loaded.ema)
        self.images_seen, self.step = state["images_seen"], state["step"]
        self.wall_s, self.saved_at = state["wall_s"], self.images_seen
        self.images_seen_at_start = self.images_seen
        self.best = state.get("best")
        self.energy.start(state.get("energy_kwh", {}))
        self.meter.restore(state["meter"], self.engine)

    def check_data(self, state: dict[str, Any]) -> None:
        """Raise UserError where a checkpoint was trained on other images than the job's."""
        self.check_classes(state.get("classes", list(self.job.classes)))
        if state["data_id"] not in (self.job.data_id, *self.job.former_data_ids):
            raise UserError(
                f"run.dir {self.job.folder} was trained on other images than data.shards holds now "
                f"(id {state['data_id']}, now {self.job.data_id}): use the images as they were "
                "then, or another run.dir"
            )

    def check_classes(self, before: list[str]) -> None:
        """Raise UserError where labels were numbered otherwise before, and the nets know labels."""
        now = list(self.job.classes)
        if before != now and self.job.objective.num_classes is not None:
            shown = ["none" if not c else f"{len(c)} ({c[0]} to {c[-1]})" for c in (before, now)]
            raise UserError(
                f"run.dir {self.job.folder} was trained with other classes: {shown[0]}, while "
                f"data.shards has {shown[1]}, numbered in ascending order: use another run.dir"
            )

    def start_telling(self) -> None:
        """Open the log, say what is about to run, start the trackers and the clock."""
        job, engine = self.job, self.engine
        self.journal = Journal(
            job, engine.copies(), self.batches.micro_batch, self.images_seen, self.step
        )
        self.progress = Progress(self.config.total_images, self.images_seen, engine.is_main)
        self.clock = Clock(self.images_seen, job.watchdog)
        job.watchdog.doing("step")
        self.energy.start(self.energy.total)

    def update(self, phase: Phase, number: int) -> bool:
        """Take one optimizer step of a phase; say whether the average took it in on the way."""
        phases, seen = self.job.objective.phases, self.images_seen + self.config.global_batch
        lr = learning_rate(self.job.optim[phase.net], seen, self.config.total_images)
        lr = float(np.float32(lr))  # a recorded step reads it from the device
        now = StepNumbers(self.images_seen, self.step, self.step * len(phases) + number, lr)
        output = self.replay(phase, now)
        if output is None:
            if self.engine.device.type == "cuda":  # elsewhere it would import the compiler
                torch.compiler.cudagraph_mark_step_begin()  # what graphs made before is done with
            again = any(
                p.net == phase.net and self.step % p.every == 0 for p in phases[number + 1 :]
            )
            average = None if again else self.ema.along(phase.net, seen, self.config.global_batch)
            given = self.clock.timed(self.batches.step(self.images_seen, self.engine.device))
            output = self.train_step.take(phase, given, lr, now.place, average)
        self.meter.add([self.metric(phase, name) for name in output.names], output.values)
        return output.averaged

    def replay(self, phase: Phase, now: StepNumbers) -> StepOutput | None:
        """Take a step, by replay once it is recorded; return None where steps are not recorded."""
        if self.graphs is None:
            return None
        recorded = self.graphs.of(phase, now.step)
        with self.clock.waiting():
            recorded.fill(now)
        output = recorded.run(now)
        if output is None:
            self.graphs = None  # for good, with what was recorded
        return output

    def metric(self, phase: Phase, name: str) -> str:
        """Name a value; the phase shows only where there are several."""
        alone = len(self.job.objective.phases) == 1
        return f"train/{name}" if alone else f"train/{phase.name}/{name}"

    def advance(self) -> None:
        """Count the step: from here on there is something to save."""
        if self.stop is not None:
            self.stop.only_note()
        self.images_seen += self.config.global_batch
        self.step += 1
        self.energy.tick()
        self.progress.advance(min(self.images_seen, self.config.total_images))

    def due(self, every: int) -> bool:
        """Say whether a multiple of `every` images was crossed in this step."""
        before = self.images_seen - self.config.global_batch
        return every > 0 and self.images_seen // every > before // every

    def evaluate(self) -> bool:
        """Measure the averaged weights; say whether they are the best so far."""
        assert self.job.evaluation is not None, "it is due only where there is one"
        with self.clock.pause("eval"), self.progress.doing("evaluating"):
            found = self.job.evaluation(self.ema.nets)
        self.measured = {name: value for name, value in found.items() if math.isfinite(value)}
        for name in found.keys() - self.measured.keys():
            warnings.warn(f"{name} is {found[name]} after {self.images_seen} images", stacklevel=2)
        name, value = next(iter(found.items()))
        if not value < (self.best["value"] if self.best else math.inf):  # nor if it is not a number
            return False
        self.best = {"metric": name, "value": value, "images_seen": self.images_seen}
        return True

    def log(self) -> None:
        """Write the means since the last log."""
        self.watch.check()
        means = self.meter.means(self.engine)
        self.wall_s += self.clock.elapsed_s()
        rates = {
            self.metric(p, "lr"): learning_rate(
                self.job.optim[p.net], self.images_seen, self.config.total_images
            )
            for p in self.job.objective.phases
        }
        line = {
            "step": self.step,
            "images_seen": self.images_seen,
            "wall_s": round(self.wall_s, 3),
            **means,
            **rates,
            **self.measured,
            **self.clock.read(self.images_seen),
            "memory/peak_gib": round(peak_memory_gib(self.engine.device), 3),
            **self.energy.read(),
        }
        self.clock.start(self.images_seen)
        self.measured = {}
        self.journal.log(line)
        losses = {k.removeprefix("train/"): v for k, v in means.items() if k.endswith("/loss")}
        self.progress.say(losses)

    def sample(self) -> None:
        """Draw grids from the averaged weights: samples, and what else the family has to show."""
        with self.clock.pause("sample"), self.progress.doing("drawing samples"):
            job, engine = self.job, self.engine
            sheets = draw_sheets(
                engine, job.objective, self.ema.nets, len(job.classes),
                self.config.samples_per_class, job.seed, self.batches,
            )  # fmt: skip
            self.journal.show(sheets, self.images_seen, self.step)

    def save(self) -> None:
        """Write a checkpoint; the log reaches the disk before it."""
        if self.saved_at == self.images_seen:
            return
        self.watch.check()
        with self.clock.pause("save"), self.progress.doing("saving"):
            full, meter = self.engine.full_state(), self.meter.state(self.engine)
            state = {
                "images_seen": self.images_seen,
                "step": self.step,
                "wall_s": self.wall_s + self.clock.elapsed_s(),
                "meter": meter,
                **self.energy.state(),
                "best": self.best,
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
            best = self.best["images_seen"] if self.best else None

            def write() -> None:
                self.journal.file.sync()
                checkpoint.write(folder, self.images_seen, whole, keep, best)

            self.engine.on_main(write)
            self.saved_at = self.images_seen

    def finish(self, done: bool) -> None:
        """Leave everything on the disk."""
        if done and self.meter.sums:
            self.log()
        last_grid = self.job.folder / "samples" / f"{self.images_seen:09d}.png"
        if done and not self.engine.on_main(last_grid.exists):
            self.sample()
        self.save()
