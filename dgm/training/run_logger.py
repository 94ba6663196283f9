"""What a run writes into its folder as it goes, beside checkpoints: log, pictures, trackers."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import nn

from dgm import images as pictures
from dgm.common.errors import UserError, disk_fault, naming
from dgm.training.engine import Engine
from dgm.training.job import Job
from dgm.training.metrics_log import MetricsFile
from dgm.training.model_summary import introduce
from dgm.training.run_folder import record_start


class Journal:
    """The first process writes as the others wait: all end alike where the disk is at fault."""

    def __init__(
        self, job: Job, nets: dict[str, nn.Module], micro_batch: int, images_seen: int, step: int
    ):
        """Say what is about to run, note the start, open log and trackers; every process must."""
        self.folder, self.engine = job.folder, job.engine

        def begin() -> MetricsFile:
            with self._naming():  # first, for a service may refuse
                start_trackers(job.engine, job.settings, step)
            introduce(job, nets, micro_batch, images_seen)
            record_start(job.folder, job.engine, images_seen, job.changed)
            return MetricsFile(job.folder / "metrics.jsonl", images_seen)

        self._file: MetricsFile | None = None
        self.engine.on_main(lambda: setattr(self, "_file", begin()))

    def log(self, line: Mapping[str, Any]) -> None:
        """Write a line of the log, its values to the trackers too; every process must ask."""

        def write() -> None:
            self.file.write(line)
            values = {key: value for key, value in line.items() if "/" in key}
            with self._naming():
                self.engine.accelerator.log(values, step=line["step"])

        self.engine.on_main(write)

    def show(self, sheets: Mapping[str, np.ndarray], images_seen: int, step: int) -> None:
        """Write sheets of the first process, uint8 [H, W, C]; every process must ask."""

        def write() -> None:
            for name, sheet in sheets.items():
                ending = "" if name == "samples" else f"-{name}"
                path = self.folder / "samples" / f"{images_seen:09d}{ending}.png"
                pictures.save_png(path, sheet)
                with self._naming():
                    show_image(self.engine, name, sheet, step)

        self.engine.on_main(write)

    @property
    def file(self) -> MetricsFile:
        """Give the log, on the first process."""
        assert self._file is not None, "the first process alone has it"
        return self._file

    def _naming(self) -> Any:
        return naming(self.folder / "tensorboard")


def start_trackers(engine: Engine, config: dict[str, object], step: int) -> None:
    """Start TensorBoard and whatever else `run.trackers` names, through accelerate.

    Raises UserError with the reason of a service that refuses.
    """
    # A resumed run writes steps again that a killed one had already written.
    options = {"tensorboard": {"purge_step": step + 1}}
    accelerator = engine.accelerator
    try:
        accelerator.init_trackers("tensorboard", init_kwargs=options)
        for tracker in accelerator.trackers:
            if tracker.name != "tensorboard":  # there it would make a second run of its own
                tracker.store_init_configuration(config)
    except Exception as error:
        for tracker in accelerator.trackers:  # some have started, others have nothing to finish
            with contextlib.suppress(Exception):
                tracker.finish()
        accelerator.trackers = []
        names = [str(getattr(tracker, "name", tracker)).lower() for tracker in accelerator.log_with]
        others = [name for name in names if name != "tensorboard"]
        if not others or disk_fault(error) is not None:
            raise
        raise UserError(_refusal(error, others)) from error


def _refusal(error: Exception, trackers: list[str]) -> str:
    """Return why a tracker did not start, and what to do about it."""
    own = [name for name in trackers if type(error).__module__.split(".")[0].startswith(name)]
    name = " or ".join(own or trackers)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = (lines or [type(error).__name__])[0].rstrip(".")
    remedy = "log in by `wandb login`, set WANDB_MODE=offline" if name == "wandb" else "set it up"
    return f"run.trackers names {name}, which did not start ({reason}): {remedy}, or leave it out"


def show_image(engine: Engine, name: str, image: np.ndarray, step: int) -> None:
    """Show one uint8 [H, W, C] picture where the tracker can show pictures."""
    for tracker in engine.accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.writer.add_image(name, image, step, dataformats="HWC")
        elif tracker.name == "wandb":
            tracker.log_images({name: [image]}, step=step)
