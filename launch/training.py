"""What the trainers share: data, run folder, start, and what is left on the screen at the end."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from dgm.objective import Objective
from dgm.report.figures import save_loss_curve
from dgm.train.engine import Engine
from dgm.train.job import Job, TrainConfig
from dgm.train.loop import train
from dgm.train.optim import OptimConfig
from dgm.train.run_folder import MAY_CHANGE, RunConfig, flatten, open_run
from launch.command import DONE, STOPPED
from shards.build import ensure
from shards.read import Shards, open_shards


@dataclass(frozen=True)
class DataConfig:
    """Where the images come from; a run knows its images by their contents, not by these."""

    source: str = field(default="cifar10", metadata=MAY_CHANGE)
    """cifar10 (downloaded), shapes (built in) or folder:PATH (a class-folder tree)."""
    shards: str | None = field(default=None, metadata=MAY_CHANGE)
    """Folder of train shards; null is data/SOURCE, built from the source where missing."""
    resize: int | None = field(default=None, metadata=MAY_CHANGE)
    """Side to which images of a folder are resized when shards are built."""


@dataclass
class Parts:
    """What a family makes of its configuration and the data."""

    nets: dict[str, nn.Module]
    objective: Objective


def run_training(config: Any, make_parts: Callable[[Shards], Parts]) -> int:
    """Train what a script configured; give the exit code.

    `config` holds at least `run`, `data`, `train` (RunConfig, DataConfig, TrainConfig) and
    `optim` (OptimConfig).
    """
    run: RunConfig = config.run
    settings: TrainConfig = config.train
    optim: OptimConfig = config.optim
    folder = Path(run.dir)
    engine = Engine(settings.mixed_precision, list(run.trackers), run.dir)
    try:
        data: DataConfig = config.data
        where = engine.on_main(lambda: str(ensure(data.source, data.shards, resize=data.resize)))
        images = open_shards(where)
        config = replace(config, data=replace(data, shards=where))
        parts = make_parts(images)
        job = Job(
            folder=folder,
            seed=run.seed,
            config=settings,
            optim=optim,
            engine=engine,
            objective=parts.objective,
            nets=parts.nets,
            data=images,
            data_id=identify(images),
            image_shape=images.image_shape,
            classes=images.classes,
            settings={key: value for key, value, _ in flatten(config)},
        )
        done = train(job, lambda: open_run(config, folder))
        # The others wait: a launcher ends the rest as soon as one process ends with code 75.
        engine.on_main(lambda: _say_goodbye(engine, folder, done))
        return DONE if done else STOPPED
    finally:
        engine.close()


def identify(images: Shards) -> str:
    """Give a short name of the images' contents."""
    sums = [f"{shard.count}:{shard.sha256}" for shard in images.index.shards]
    return hashlib.sha256("\n".join(sums).encode()).hexdigest()[:16]


def _say_goodbye(engine: Engine, folder: Path, done: bool) -> None:
    engine.finish_trackers()
    curve = save_loss_curve(folder)
    if not done:
        print("stopped and saved: run the same command to continue")
    grids = sorted((folder / "samples").glob("*.png"))
    if grids:
        print(f"sample grid: {grids[-1]}")
    if curve:
        print(f"loss curve:  {curve}")
    sys.stdout.flush()
