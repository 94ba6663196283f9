"""What the trainers share: data, run folder, start, and what is left on the screen at the end."""

from __future__ import annotations

import hashlib
import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

from torch import nn

from dgm.addresses import without_password
from dgm.errors import UserError, disk_fault, naming
from dgm.eval.during import EvalConfig, RealImages, make_evaluation
from dgm.objective import Objective
from dgm.report.figures import save_loss_curve
from dgm.train.checkpoint import complete_names
from dgm.train.engine import Engine
from dgm.train.job import Job
from dgm.train.lock import RunLock
from dgm.train.loop import train
from dgm.train.optim import OptimConfig
from dgm.train.run_folder import MAY_CHANGE, flatten, open_run
from dgm.train.stop import StopRequest
from dgm.train.watchdog import Watchdog
from launch.command import DONE, STOPPED, leave, parse, signals_at_end
from launch.places import check_folder
from launch.room import check_room
from shards.build import ensure
from shards.folders import cache_root, remove_unfinished
from shards.read import Shards, open_shards


@dataclass(frozen=True)
class DataConfig:
    """Where the images come from; a run knows its images by their contents, not by these."""

    source: str = field(default="cifar10", metadata=MAY_CHANGE)
    """cifar10 (downloaded), shapes (built in) or folder:PATH (a class-folder tree)."""
    shards: str | None = field(default=None, metadata=MAY_CHANGE)
    """Folder of train shards; null is data/SOURCE, built from the source where missing."""
    test_shards: str | None = field(default=None, metadata=MAY_CHANGE)
    """Folder of test shards, for what eval.* measures on test images; as `shards` for null."""
    resize: int | None = field(default=None, metadata=MAY_CHANGE)
    """Side to which images of a folder are resized when shards are built."""


@dataclass
class Parts:
    """What a family makes of its configuration and the data."""

    nets: dict[str, nn.Module]
    objective: Objective
    optim: dict[str, OptimConfig] = field(default_factory=dict)  # of nets that have their own


MakeParts = Callable[[Any, tuple[int, int, int], int], Parts]
"""Builds nets and objective from a configuration, an image's shape and the number of classes."""


def run_training(config_class: type, default_config: str, make_parts: MakeParts) -> int:
    """Train by the configuration of the command line; give the exit code.

    `config_class` holds at least `run`, `data`, `optim`, `train` and `eval` (RunConfig, DataConfig,
    OptimConfig, TrainConfig and EvalConfig).
    """
    stop = StopRequest(at_once=_leave)
    try:
        code = _run(parse(config_class, default_config, sys.argv[1:]), make_parts, stop)
    except BaseException:
        stop.close()
        raise
    signals_at_end(stop.close)
    return code


def _run(config: Any, make_parts: MakeParts, stop: StopRequest) -> int:
    folder, minutes = Path(config.run.dir), config.train.timeout_minutes
    check_folder("run.dir", folder)
    engine = Engine(
        config.train.mixed_precision,
        list(config.run.trackers),
        config.run.dir,
        minutes,
        config.train.deterministic,
        config.train.tf32,
        config.train.threads,
    )
    watchdog, lock = Watchdog(minutes), RunLock(folder)
    try:
        watchdog.start()
        job, config = _prepare(config, make_parts, engine, watchdog)
        done = train(job, lambda: open_run(config, folder, lock), stop)
        # The others wait: a launcher ends the rest as soon as one process ends with code 75.
        engine.on_main(lambda: _say_goodbye(engine, folder, done))
        return DONE if done else STOPPED
    except OSError as error:
        fault = disk_fault(error)
        if fault is None:
            raise
        raise UserError(f"{fault}; {_where_it_continues(folder)}") from error
    finally:
        engine.close()
        watchdog.close()
        lock.release()


def _prepare(
    config: Any, make_parts: MakeParts, engine: Engine, watchdog: Watchdog
) -> tuple[Job, Any]:
    """Open the shards, built where missing, and put the run together; name them in its keys."""
    data: DataConfig = config.data
    if engine.is_main:  # the others wait for it
        watchdog.doing("prepare")
    where = engine.on_main(lambda: str(ensure(data.source, data.shards, resize=data.resize)))
    images = open_shards(where)
    check_room(make_parts, config, images)
    job = make_job(
        config, engine, images, make_parts(config, images.image_shape, images.num_classes)
    )
    job.watchdog = watchdog
    return job, replace(config, data=replace(data, shards=where))


def _leave() -> NoReturn:
    """End a process that has nothing to save yet."""
    remove_unfinished()
    leave(STOPPED, "stopped before its first step: run the same command to continue")


def _where_it_continues(folder: Path) -> str:
    saved = complete_names(folder / "checkpoints")
    return f"it continues from {int(saved[-1]):,} images" if saved else "nothing was saved so far"


def make_job(config: Any, engine: Engine, images: Shards, parts: Parts) -> Job:
    """Put together a run: a configuration, as `run_training` has it, and the family's parts."""
    real = RealImages(
        images, images.num_classes, identify(images), lambda: open_test(config.data, engine)
    )
    measured: EvalConfig = config.eval
    return Job(
        folder=Path(config.run.dir),
        seed=config.run.seed,
        config=config.train,
        optim={name: parts.optim.get(name, config.optim) for name in parts.nets},
        engine=engine,
        objective=parts.objective,
        nets=parts.nets,
        data=images,
        data_id=real.data_id,
        image_shape=images.image_shape,
        classes=images.classes,
        settings={
            k: without_password(v) if isinstance(v, str) else v for k, v, _ in flatten(config)
        },  # as trackers are told
        evaluation=make_evaluation(measured, parts.objective, engine, real, cache_root()),
        eval_every_images=measured.every_images,
    )


def identify(images: Shards) -> str:
    """Give a short name of the images' contents."""
    sums = [f"{shard.count}:{shard.sha256}" for shard in images.index.shards]
    return hashlib.sha256("\n".join(sums).encode()).hexdigest()[:16]


def open_test(data: DataConfig, engine: Engine) -> Shards:
    """Open the test images that go with the train images, built where missing."""
    if data.test_shards is None and data.shards is not None:
        raise UserError(
            f"data.shards is {data.shards}, but data.test_shards is not given: name the shards of "
            "its test images, or set eval.every_images 0"
        )
    return open_shards(
        engine.on_main(
            lambda: str(ensure(data.source, data.test_shards, split="test", resize=data.resize))
        )
    )


def _say_goodbye(engine: Engine, folder: Path, done: bool) -> None:
    with naming(folder / "tensorboard"):
        engine.finish_trackers()
    curve = save_loss_curve(folder)
    if not done:
        print("stopped and saved: run the same command to continue")
    _say_lowest(folder)
    grids = sorted((folder / "samples").glob("*.png"))
    if grids:
        print(f"sample grid: {grids[-1]}")
    if curve:
        print(f"loss curve:  {curve}")
    sys.stdout.flush()


def _say_lowest(folder: Path) -> None:
    path = folder / "minima.json"
    if path.exists():
        try:
            for name, least in json.loads(path.read_text(encoding="utf-8")).items():
                if name.startswith("eval/") or "loss" in name:
                    where = f"after {least['images_seen']:,} images"
                    print(f"{'lowest:':12} {name} {least['value']:.4f} {where}")
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            warnings.warn(f"{path} is damaged; the next log writes it anew", stacklevel=2)
