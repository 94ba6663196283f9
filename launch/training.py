"""What the trainers share: data, run folder, start, and what is left on the screen at the end."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

from torch import nn

from dgm.addresses import without_password
from dgm.errors import UserError, disk_fault, naming
from dgm.eval.during import EvalConfig, RealImages, make_evaluation
from dgm.objective import Objective
from dgm.report.figures import save_loss_curve
from dgm.train.checkpoint import complete_names, newest, read_state
from dgm.train.engine import Engine
from dgm.train.job import Job, check
from dgm.train.lock import RunLock
from dgm.train.loop import train
from dgm.train.optim import OptimConfig
from dgm.train.run_folder import MAY_CHANGE, PATH, RunFolder, flatten
from dgm.train.sampling import shown_classes
from dgm.train.stop import StopRequest
from dgm.train.watchdog import Watchdog
from launch.command import DONE, STOPPED, leave, parse, signals_at_end
from launch.early_stop import unwatch
from launch.places import check_folder
from launch.room import check_room
from shards.build import CheckImages, CheckIndex, default_folder, describe_shards, ensure
from shards.errors import ShardError
from shards.folders import cache_root, remove_unfinished
from shards.format import INDEX, Index
from shards.read import Shards, open_shards
from shards.remote import is_remote
from shards.sources import FolderOptions, source_name


@dataclass(frozen=True)
class DataConfig:
    """Where the images come from; a run knows its images by their contents, not by these."""

    source: str = field(default="cifar10", metadata={**MAY_CHANGE, **PATH})
    """cifar10 (downloaded), shapes (built in) or folder:PATH (a class-folder tree)."""
    shards: str | None = field(default=None, metadata={**MAY_CHANGE, **PATH})
    """Folder of train shards; null is data/SOURCE, built from the source where missing."""
    test_shards: str | None = field(default=None, metadata={**MAY_CHANGE, **PATH})
    """Folder of test shards, for what eval.* measures on test images; as `shards` for null."""
    resize: int | None = field(default=None, metadata=MAY_CHANGE)
    """Side to which images are cut, as centred squares, and resized, bicubic; null leaves them."""
    background: str = field(default="white", metadata=MAY_CHANGE)
    """What transparent images of a folder are composed on: white, black or R,G,B."""
    holdout: float = field(default=0.0, metadata=MAY_CHANGE)
    """Fraction of a folder's images that is held out as test images, chosen by file name, where
    the folder has no test images of its own."""
    skip_bad: bool = field(default=False, metadata=MAY_CHANGE)
    """Leave damaged images of a folder out instead of refusing the folder."""

    @property
    def options(self) -> FolderOptions:
        """Return how a folder's images are read."""
        return FolderOptions(self.background, self.holdout, self.skip_bad)


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
        unwatch()  # a launcher's SIGTERM must not turn a failure into code 75
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
        done = train(job, RunFolder(config, folder, lock), stop)
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
    check(config.train, engine.asked)
    run = Path(config.run.dir)
    engine.on_main(RunFolder(config, run).check)  # before shards are built
    fits = functools.partial(check_room, make_parts, config)
    same = functools.partial(check_rebuilt, run)
    where = engine.on_main(lambda: str(ensure_split(data, "train", check=fits, check_index=same)))
    images = open_shards(where, data.resize)
    fits(images.image_shape, images.num_classes)
    job = make_job(
        config, engine, images, make_parts(config, images.image_shape, images.num_classes)
    )
    job.watchdog = watchdog
    if engine.is_main:
        _say_what_sheets_show(job)
        job.data_line = describe_shards(Path(where), images)
    return job, replace(config, data=with_whole_paths(replace(data, shards=where)))


def _say_what_sheets_show(job: Job) -> None:
    """Print which samples sheets have space for, where those are not all."""
    count, per_class = len(job.classes), job.config.samples_per_class
    classes, columns = shown_classes(count, per_class, *job.image_shape[:2])
    if (len(classes), columns) != (count, per_class):
        print(
            f"samples/*.png show {len(classes)} of {count} classes, evenly spaced, and {columns} "
            "images of each, for want of space; launch/sample.py makes all"
        )


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
        images,
        images.num_classes,
        identify(images),
        lambda: open_test(config.data, engine, images.classes),
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
        former_data_ids=former_ids(images),
        image_shape=images.image_shape,
        classes=images.classes,
        settings={
            k: without_password(v) if isinstance(v, str) else v for k, v, _ in flatten(config)
        },  # as trackers are told
        evaluation=make_evaluation(measured, parts.objective, engine, real, cache_root()),
        eval_every_images=measured.every_images,
    )


def check_rebuilt(run: Path, index: Index) -> None:
    """Raise UserError where shards of other images would replace those of a trained run."""
    found = newest(run / "checkpoints")
    before, now = read_state(found)["data_id"] if found else None, _name(_checksums(index))
    if before not in (None, now):
        raise UserError(
            f"run.dir {run} was trained on other images than data.source holds now (id {before}, "
            f"now {now}), whose shards stay as they were: use the run's images (restore them, or "
            "name its shards by --data.shards) or another run.dir"
        )


def identify(images: Shards) -> str:
    """Return a short name of the images' contents, and of their labels if numbered otherwise."""
    renumbered = images.classes != images.index.classes
    return _name(_checksums(images.index) + [json.dumps(images.classes)] * renumbered)


def known_as(images: Shards) -> tuple[str, ...]:
    """Return the names that a run trained on these images may have noted, older versions' too."""
    return (_name(_checksums(images.index)), *former_ids(images))


def _checksums(index: Index) -> list[str]:
    return [f"{shard.count}:{shard.sha256}" for shard in index.shards]


def former_ids(images: Shards) -> tuple[str, ...]:
    """Return the names that older versions gave to the same images.

    They knew no checksums of other people's tars that are read where they lie.
    """
    if (images.folder / INDEX).is_file():
        return ()
    return (_name([f"{shard.count}:" for shard in images.index.shards]),)


def _name(sums: list[str]) -> str:
    return hashlib.sha256("\n".join(sums).encode()).hexdigest()[:16]


def ensure_split(
    data: DataConfig,
    split: str,
    classes: Sequence[str] | None = None,
    check: CheckImages | None = None,
    check_index: CheckIndex | None = None,
) -> Path:
    """Return the folder of a run's train or test shards, built where missing, checked.

    classes: of the train images, by which labels of test images are numbered; check: called with
    the images' shape and number of classes before anything is built; check_index: before shards
    that are built again replace the older ones.
    """
    given = data.shards if split == "train" else data.test_shards
    # A run's config.yaml names its train shards, beside which those of the test images lie.
    root = beside_which(data) if split == "test" else None
    return ensure(
        data.source, given, split, data.resize, options=data.options, root=root,
        classes=classes, check=check, check_index=check_index,
    )  # fmt: skip


def beside_which(data: DataConfig) -> Path | None:
    """Return the folder in which data.shards lie if a trainer built them by default."""
    if data.shards is None:
        return None
    shards = Path(os.path.expanduser(data.shards))
    try:
        name = default_folder(data.source, "train", data.resize, data.options).name
    except ShardError:  # of a source that is unknown: the shards come from elsewhere
        return None
    return shards.parent if shards.name == name else None


def with_whole_paths(data: DataConfig) -> DataConfig:
    """Make paths absolute, so that they hold in any working directory."""
    source = data.source
    if source.startswith("folder:"):
        source = source_name(source)
    return replace(
        data, source=source, shards=_whole(data.shards), test_shards=_whole(data.test_shards)
    )


def _whole(path: str | None) -> str | None:
    return path if path is None or is_remote(path) else os.path.abspath(os.path.expanduser(path))


def open_test(data: DataConfig, engine: Engine, classes: Sequence[str]) -> Shards:
    """Open the test images that go with the train images, built where missing.

    classes: those of the train images, by which labels are numbered.
    """
    if data.test_shards is None and data.shards is not None and beside_which(data) is None:
        raise UserError(
            f"data.shards is {data.shards}, but data.test_shards is not given: name the shards of "
            "its test images, or set eval.every_images 0"
        )
    where = engine.on_main(lambda: str(ensure_split(data, "test", classes)))
    return open_shards(where, data.resize, classes)


def _say_goodbye(engine: Engine, folder: Path, done: bool) -> None:
    with naming(folder / "tensorboard"):
        engine.finish_trackers()
    curve = save_loss_curve(folder)
    if done:
        print(f"finished: {int(complete_names(folder / 'checkpoints')[-1]):,} images seen")
    else:
        print("stopped and saved: run the same command to continue")
    _print_best(folder)
    grids = sorted((folder / "samples").glob("*.png"))
    if grids:
        print(f"sample grid: {grids[-1]}")
    if curve:
        print(f"loss curve:  {curve}")
    sys.stdout.flush()


def _print_best(folder: Path) -> None:
    path = folder / "minima.json"
    if path.exists():
        try:
            for name, best in json.loads(path.read_text(encoding="utf-8")).items():
                if name.startswith("eval/") or "loss" in name:
                    which = "highest:" if best.get("best") == "max" else "lowest:"
                    where = f"after {best['images_seen']:,} images"
                    print(f"{which:12} {name} {best['value']:.4f} {where}")
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            warnings.warn(f"{path} is damaged; the next log writes it anew", stacklevel=2)
