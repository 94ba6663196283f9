"""Metrics, sample images and trackers of a run."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.tracking import filter_trackers, get_available_trackers
from torch import nn

from dgm.common.errors import UserError, disk_fault, naming
from dgm.images import save_png
from dgm.training.engine import Engine
from dgm.training.job import Job
from dgm.training.metrics_log import MetricsFile
from dgm.training.model_summary import print_summary
from dgm.training.run_folder import record_start


class RunLogger:
    """Writes what a run logs; on the first process only, by `Engine.on_main`."""

    def __init__(
        self, job: Job, nets: dict[str, nn.Module], micro_batch: int, images_seen: int, step: int
    ):
        """Start trackers, print the summary, record the start, open the log."""
        self.folder, self.engine = job.folder, job.engine
        with self._naming():  # first, because a service may refuse
            start_trackers(job.engine, job.trackers, job.folder, job.settings, step)
        print_summary(job, nets, micro_batch, images_seen)
        record_start(job.folder, job.engine, images_seen, job.changed)
        self.file = MetricsFile(job.folder / "metrics.jsonl", images_seen)

    def log(self, line: Mapping[str, Any]) -> None:
        """Write a line to the log and its metrics to the trackers."""
        self.file.write(line)
        values = {key: value for key, value in line.items() if "/" in key}
        with self._naming():
            self.engine.accelerator.log(values, step=line["step"])

    def log_images(self, grids: Mapping[str, np.ndarray], images_seen: int, step: int) -> None:
        """Write image grids, uint8 [H, W, C], by name."""
        for name, grid in grids.items():
            ending = "" if name == "samples" else f"-{name}"
            path = self.folder / "samples" / f"{images_seen:09d}{ending}.png"
            save_png(path, grid)
            with self._naming():
                track_image(self.engine, name, grid, step)

    def _naming(self) -> Any:
        return naming(self.folder / "tensorboard")


def check_trackers(names: list[str]) -> None:
    """Raise UserError where a tracker is unknown or not installed."""
    # Accelerate silently leaves out a tracker that is not installed.
    available = [str(tracker.value) for tracker in get_available_trackers()]
    missing = [name for name in names if name not in available]
    if missing:
        raise UserError(
            f"run.trackers names {', '.join(missing)}, which is unknown or not installed: "
            f"install it or choose from {', '.join(available) or 'none'}"
        )


def start_trackers(
    engine: Engine, trackers: list[Any], folder: Path, config: dict[str, object], step: int
) -> None:
    """Start TensorBoard and whatever else `run.trackers` names, through accelerate.

    Raise UserError with the reason if a service refuses.
    """
    engine.accelerator.project_configuration.set_directories(str(folder))
    engine.accelerator.log_with = filter_trackers(trackers, str(folder))
    # A resumed run repeats steps that a killed one had already logged.
    options = {"tensorboard": {"purge_step": step + 1}}
    accelerator = engine.accelerator
    try:
        accelerator.init_trackers("tensorboard", init_kwargs=options)
        for tracker in accelerator.trackers:
            if tracker.name != "tensorboard":  # there it would create a second run
                tracker.store_init_configuration(config)
    except Exception as error:
        for tracker in accelerator.trackers:  # only some have started
            with contextlib.suppress(Exception):
                tracker.finish()
        accelerator.trackers = []
        names = [str(getattr(tracker, "name", tracker)).lower() for tracker in accelerator.log_with]
        others = [name for name in names if name != "tensorboard"]
        if not others or disk_fault(error) is not None:
            raise
        raise UserError(_refusal(error, others)) from error


def _refusal(error: Exception, trackers: list[str]) -> str:
    """Return a message that says why a tracker did not start, and the remedy."""
    matching = [name for name in trackers if type(error).__module__.split(".")[0].startswith(name)]
    name = " or ".join(matching or trackers)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = (lines or [type(error).__name__])[0].rstrip(".")
    remedy = "log in by `wandb login`, set WANDB_MODE=offline" if name == "wandb" else "set it up"
    return f"run.trackers names {name}, which did not start ({reason}): {remedy}, or leave it out"


def track_image(engine: Engine, name: str, image: np.ndarray, step: int) -> None:
    """Log one uint8 [H, W, C] image to the trackers that support images."""
    for tracker in engine.accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.writer.add_image(name, image, step, dataformats="HWC")
        elif tracker.name == "wandb":
            tracker.log_images({name: [image]}, step=step)
