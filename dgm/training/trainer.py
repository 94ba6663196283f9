"""The training loop of every family: restore, step until done or asked to stop, save."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Hashable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dgm.common.atomic_io import sync
from dgm.common.errors import UserError
from dgm.objective import InitializedByData, Phase, StepDependent
from dgm.training import checkpoint, oom
from dgm.training.cuda_graph import (
    CapturedStep,
    CudaCapturer,
    MicroBatches,
    StepNumbers,
    StepOutput,
)
from dgm.training.ema import Ema
from dgm.training.energy import EnergyMeter, find_counters
from dgm.training.finite_check import FiniteCheck
from dgm.training.job import (
    Job,
    apply_net_options,
    captures_steps,
    check_config,
    check_micro_batches,
    uses_kernels,
)
from dgm.training.metrics_log import Clock, Meter, ProgressBar, make_profiler, peak_memory_gib
from dgm.training.optimizer import EmaUpdate, learning_rate
from dgm.training.run_folder import RunFolder
from dgm.training.run_logger import RunLogger
from dgm.training.sampler import BatchSampler
from dgm.training.sampling import draw_grids
from dgm.training.state_dicts import load_nets, tensors_of
from dgm.training.stop_request import StopRequest


class Trainer:
    """Trains a job: `train` restores it and repeats `train_step` and `after_step`."""

    def __init__(self, job: Job):
        """Prepare nets, EMA and data; raise UserError where a setting is invalid."""
        self.job, self.config, self.engine = job, job.config, job.engine
        config, engine = job.config, job.engine
        check_config(config, engine.launch)
        self.batches = BatchSampler(
            job.data, job.seed, config.global_batch, config.micro_batch,
            engine.rank, engine.world_size, config.overfit_one_batch, config.images_on_device,
        )  # fmt: skip
        check_micro_batches(job.objective, self.batches)
        self._prepare_nets()
        averaged = {phase.net for phase in job.objective.phases if phase.average}
        initial = {name: net for name, net in engine.copy_nets().items() if name in averaged}
        self.ema = Ema(initial, config.ema_halflife_images)
        self.finite_check = FiniteCheck(engine, job.objective, self.batches)
        captures = captures_steps(config, engine.launch)
        self.capturer = CudaCapturer(engine.device) if captures else None
        self.captured_steps: dict[Hashable, CapturedStep] = {}  # by phase and variant of its loss
        self.images_seen = self.images_seen_at_start = self.step = 0
        self.wall_s = 0.0
        self.meter = Meter()
        self.energy = EnergyMeter(find_counters(engine.device) if engine.is_main else {})
        self.progress = ProgressBar(config.total_images, 0, shown=False)
        self.saved_at = -1
        self.eval_metrics: dict[str, float] = {}  # evaluated, not yet logged
        self.best: dict[str, Any] | None = None  # the best evaluation so far

    def _prepare_nets(self) -> None:
        """Initialize weights from data where the family does so, and wrap the nets."""
        job, engine = self.job, self.engine
        if isinstance(job.objective, InitializedByData):
            nets = {name: net.to(engine.device) for name, net in job.nets.items()}
            with torch.no_grad():
                job.objective.initialize(nets, *self.batches.first_images(256, engine.device))
        apply_net_options(job.nets, job.config, engine.launch, engine.device)
        engine.prepare(job.nets, job.optim, uses_kernels(job.config))

    def train(self, folder: RunFolder, stop: StopRequest | None = None) -> bool:
        """Train until `total_images` or a request to stop; return whether the run is finished.

        The configuration is written only after the newest checkpoint was found to fit, so that a
        mistake changes nothing in the folder.
        """
        if stop is None:
            with contextlib.closing(StopRequest()) as own:
                return self.train(folder, own)
        job, config, engine = self.job, self.config, self.engine
        job.changed = engine.on_main(folder.open)
        try:
            job.watchdog.set_activity("start")
            self.restore()
            engine.on_main(folder.write_config)
            self.start_logging()
            if engine.world_size > 1:
                stop.defer()  # or one process might exit as another begins its first step
            steps = config.profile_steps if engine.is_main else 0
            profiler = make_profiler(job.folder / "profile", steps)
            with torch.autograd.set_detect_anomaly(config.detect_anomaly), profiler as profile:
                while self.images_seen < config.total_images:
                    with oom.MemoryGuard() as memory:
                        self.train_step()
                    if memory.exceeded:  # the tensors of the failed step are freed by now
                        raise oom.advise(job, self.batches)
                    stop.defer()  # from here on there is something to save
                    self.after_step()
                    if profile is not None:
                        profile.step()
                    if engine.any_rank(stop.raised):
                        break
            is_done = self.images_seen >= config.total_images
            self.finish(is_done)
            return is_done
        except UserError:
            if engine.is_main and self.images_seen == self.images_seen_at_start:
                folder.discard()
            raise
        finally:
            stop.defer()
            job.watchdog.set_activity("save")
            self.progress.close()

    def train_step(self) -> None:
        """Train on one global batch: update each phase's net, then the moving average."""
        phases, batch = self.job.objective.phases, self.config.global_batch
        images_after = self.images_seen + batch
        due = {k: phase for k, phase in enumerate(phases) if self.step % phase.every == 0}
        last_update = {phase.net: k for k, phase in due.items()}
        averaged: dict[str, bool] = {}  # nets whose average the optimizer has updated too
        for k, phase in due.items():
            lr = learning_rate(self.job.optim[phase.net], images_after, self.config.total_images)
            lr = float(np.float32(lr))  # as a captured step reads it from the device
            now = StepNumbers(self.images_seen, self.step, self.step * len(phases) + k, lr)
            output = self._replay(phase, now)
            if output is None:
                is_last = k == last_update[phase.net]
                ema = self.ema.fused_update(phase.net, images_after, batch) if is_last else None
                if self.engine.device.type == "cuda":  # elsewhere it would import the compiler
                    torch.compiler.cudagraph_mark_step_begin()  # frees outputs of earlier graphs
                micro_batches = self.batches.micro_batches(self.images_seen, self.engine.device)
                timed = self.clock.timed(micro_batches)
                output = self.update_net(phase, timed, lr, now.gradient_index, ema)
            averaged[phase.net] = output.averaged
            self.meter.add([self.metric_name(phase, name) for name in output.names], output.values)
        self.images_seen, self.step = images_after, self.step + 1
        with self.engine.full_weights() as nets:
            self.ema.update(nets, self.images_seen, batch, averaged)

    def update_net(
        self,
        phase: Phase,
        micro_batches: MicroBatches,
        lr: float,
        gradient_index: int | Tensor,
        ema: EmaUpdate | None = None,
    ) -> StepOutput:
        """Update the phase's net once: forward, backward, clip, optimizer step.

        Nothing here waits for the device, unless the finite check reads norms on the host.
        """
        wrapped, num_micro = self.engine.wrapped_nets[phase.net], self.batches.num_micro
        metrics: list[dict[str, Tensor]] = []
        norms: list[Tensor] = []

        def check(norm: Tensor) -> Tensor | None:
            norms.append(norm)
            return self.finite_check.check_norm(norm, gradient_index)

        with self.engine.freeze_others(phase.net) as nets:
            for batch, draws in micro_batches:

                def compute_loss(batch=batch, draws=draws) -> Tensor:
                    with self.engine.autocast():
                        out = self.job.objective.loss(nets, batch, phase, draws)
                    metrics.append({name: value.detach() for name, value in out.items()})
                    return out["loss"] if num_micro == 1 else out["loss"] / num_micro

                is_last = len(metrics) == num_micro - 1
                wrapped.backward(wrapped.forward(compute_loss, sync=is_last))
        averaged = wrapped.clip_and_step(lr, check, ema)
        rows = [torch.stack([*each.values(), *norms]).double() for each in metrics]
        means = rows[0] if len(rows) == 1 else torch.stack(rows).mean(0)
        return StepOutput((*metrics[0], "grad_norm"), means, averaged)

    def _replay(self, phase: Phase, now: StepNumbers) -> StepOutput | None:
        """Take a step by CUDA graph; return None where steps are not captured."""
        if self.capturer is None:
            return None
        objective = self.job.objective
        variant = objective.variant(phase, now.step) if isinstance(objective, StepDependent) else 0
        key = (phase.name, variant)
        if key not in self.captured_steps:
            self.captured_steps[key] = CapturedStep(
                self.engine, self.batches, phase, self.update_net, self.capturer
            )
        captured = self.captured_steps[key]
        with self.clock.during("data"):
            captured.fill(now)
        output = captured.run(now)
        if output is None:
            self.capturer = None  # runs eagerly from now on
            self.captured_steps.clear()  # frees the captured graphs
        return output

    def after_step(self) -> None:
        """Do what is due: evaluate, log, sample, save."""
        every = self.config.cadences
        self.energy.read_if_due()
        self.progress.advance(min(self.images_seen, self.config.total_images))
        improved = self.is_due(self.job.eval_every_images) and self.evaluate()
        if self.is_due(every["log"]) or self.eval_metrics:
            self.log()
        if self.is_due(every["samples"]):
            self.sample()
        if self.is_due(every["checkpoint"]) or improved:
            self.save()

    def is_due(self, every: int) -> bool:
        """Return whether this step reached a multiple of `every` images."""
        before = self.images_seen - self.config.global_batch
        return every > 0 and self.images_seen // every > before // every

    def restore(self) -> None:
        """Continue from the newest intact checkpoint, if there is one."""
        folder = self.job.folder / "checkpoints"
        found = self.engine.on_main(lambda: checkpoint.take_over(folder, self.check_data))
        if found is None:
            return
        loaded = checkpoint.read(found)
        state: dict[str, Any] = loaded.state
        self.engine.load_full_state(loaded.model, loaded.optimizer)
        load_nets(self.ema.nets, loaded.ema)
        self.images_seen, self.step = state["images_seen"], state["step"]
        self.wall_s, self.saved_at = state["wall_s"], self.images_seen
        self.images_seen_at_start = self.images_seen
        self.best = state.get("best")
        self.energy.start(state.get("energy_kwh", {}))
        self.meter.restore(state["meter"], self.engine)

    def check_data(self, state: dict[str, Any]) -> None:
        """Raise UserError where a checkpoint was trained on other images or other class numbers."""
        before, now = state.get("classes", list(self.job.classes)), list(self.job.classes)
        if before != now and self.job.objective.num_classes is not None:
            old, new = ("none" if not c else f"{len(c)} ({c[0]} to {c[-1]})" for c in (before, now))
            raise UserError(
                f"run.dir {self.job.folder} was trained with other classes: {old}, while "
                f"data.shards has {new}, numbered in ascending order: use another run.dir"
            )
        if state["data_id"] not in (self.job.data_id, *self.job.former_data_ids):
            raise UserError(
                f"run.dir {self.job.folder} was trained on other images than data.shards holds now "
                f"(id {state['data_id']}, now {self.job.data_id}): use the images as they were "
                "then, or another run.dir"
            )

    def start_logging(self) -> None:
        """Open the log, print the summary, start trackers and clock."""
        job, engine = self.job, self.engine
        nets, micro_batch = engine.copy_nets(), self.batches.micro_batch

        def begin() -> None:
            self.logger = RunLogger(job, nets, micro_batch, self.images_seen, self.step)

        engine.on_main(begin)
        self.progress = ProgressBar(self.config.total_images, self.images_seen, engine.is_main)
        self.clock = Clock(self.images_seen, job.watchdog)
        job.watchdog.set_activity("step")
        self.energy.start(self.energy.total)

    def metric_name(self, phase: Phase, name: str) -> str:
        """Return a metric's key; it names the phase only where there are several."""
        has_one = len(self.job.objective.phases) == 1
        return f"train/{name}" if has_one else f"train/{phase.name}/{name}"

    def evaluate(self) -> bool:
        """Evaluate the EMA weights; return whether they are the best so far."""
        assert self.job.evaluation is not None, "it is due only where there is one"
        with self.clock.during("eval"), self.progress.during("evaluating"):
            found = self.job.evaluation(self.ema.nets)
        self.eval_metrics = {name: value for name, value in found.items() if math.isfinite(value)}
        for name in found.keys() - self.eval_metrics.keys():
            warnings.warn(f"{name} is {found[name]} after {self.images_seen} images", stacklevel=2)
        name, value = next(iter(found.items()))
        if not value < (self.best["value"] if self.best else math.inf):  # true for NaN as well
            return False
        self.best = {"metric": name, "value": value, "images_seen": self.images_seen}
        return True

    def log(self) -> None:
        """Write the means since the last log."""
        self.finite_check.raise_if_found()
        means = self.meter.means(self.engine)
        self.wall_s += self.clock.elapsed_s()
        rates = {
            self.metric_name(p, "lr"): learning_rate(
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
            **self.eval_metrics,
            **self.clock.read(self.images_seen),
            "memory/peak_gib": round(peak_memory_gib(self.engine.device), 3),
            **self.energy.read(),
        }
        self.clock.start(self.images_seen)
        self.eval_metrics = {}
        self.engine.on_main(lambda: self.logger.log(line))
        losses = {k.removeprefix("train/"): v for k, v in means.items() if k.endswith("/loss")}
        self.progress.set_losses(losses)

    def sample(self) -> None:
        """Write image grids of the EMA weights: samples, and the family's own grids."""
        with self.clock.during("sample"), self.progress.during("drawing samples"):
            grids = draw_grids(
                self.engine, self.job.objective, self.ema.nets, len(self.job.classes),
                self.config.samples_per_class, self.job.seed, self.batches,
            )  # fmt: skip
            self.engine.on_main(lambda: self.logger.log_images(grids, self.images_seen, self.step))

    def save(self) -> None:
        """Write a checkpoint; the log is synced to the disk before it."""
        if self.saved_at == self.images_seen:
            return
        self.finite_check.raise_if_found()
        with self.clock.during("save"), self.progress.during("saving"):
            weights, moments = self.engine.full_state()
            state = {
                "images_seen": self.images_seen,
                "step": self.step,
                "wall_s": self.wall_s + self.clock.elapsed_s(),
                "meter": self.meter.state(self.engine),
                **self.energy.state(),
                "best": self.best,
                "data_id": self.job.data_id,
                "image_shape": list(self.job.image_shape),
                "classes": list(self.job.classes),
            }
            average = tensors_of(self.ema.nets)
            content = checkpoint.Checkpoint(weights, moments, average, state)
            folder, keep = self.job.folder / "checkpoints", self.config.keep_checkpoints
            best = self.best["images_seen"] if self.best else None

            def write() -> None:
                sync(self.logger.file.path)
                checkpoint.write(folder, self.images_seen, content, keep, best)

            self.engine.on_main(write)
            self.saved_at = self.images_seen

    def finish(self, is_done: bool) -> None:
        """Write the last log and grid of a run that is done, and the checkpoint."""
        if is_done and self.meter.sums:
            self.log()
        last_grid = self.job.folder / "samples" / f"{self.images_seen:09d}.png"
        if is_done and not self.engine.on_main(last_grid.exists):
            self.sample()
        self.save()
