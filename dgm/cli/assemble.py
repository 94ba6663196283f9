"""Assemble a training run from its configuration: process, data, run folder, trainer."""

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

import torch
from torch import nn

from dgm.cli.entry import exit_before_first_step, ignore_signals_at_exit, restore_signals
from dgm.cli.memory_check import check_memory
from dgm.cli.parser import parse
from dgm.cli.path_checks import check_folder
from dgm.common.atomic_dirs import remove_unfinished
from dgm.common.cache import cache_root
from dgm.common.config_keys import MAY_CHANGE, PATH, flatten
from dgm.common.errors import UserError, disk_fault, naming
from dgm.common.exit_codes import DONE, STOPPED
from dgm.common.redact import without_password
from dgm.evaluation.online_eval import EvalConfig, RealImages, make_evaluation
from dgm.objective import Objective
from dgm.report.figures import save_loss_curve
from dgm.training.checkpoint import complete_names, newest, read_state
from dgm.training.engine import Engine
from dgm.training.job import Job, TrainConfig, check_config
from dgm.training.optimizer import OptimConfig
from dgm.training.process_settings import start_engine
from dgm.training.run_folder import RunConfig, RunFolder
from dgm.training.run_lock import RunLock
from dgm.training.run_logger import check_trackers
from dgm.training.sampling import grid_classes
from dgm.training.stop_request import StopRequest
from dgm.training.trainer import Trainer
from dgm.training.watchdog import Watchdog
from shards.build import CheckImages, CheckIndex, default_folder, describe_shards, ensure
from shards.format import INDEX, Index
from shards.reader import Shards, open_shards
from shards.remote import is_remote
from shards.sources import FolderOptions, source_name


@dataclass(frozen=True)
class DataConfig:
    """The source of the images; a run identifies its images by content, not by these keys."""

    source: str = field(default="cifar10", metadata={**MAY_CHANGE, **PATH})
    """cifar10 (downloaded), shapes (built in) or folder:PATH (one folder per class)."""
    shards: str | None = field(default=None, metadata={**MAY_CHANGE, **PATH})
    """Folder of train shards; null is data/SOURCE, built from the source if missing."""
    test_shards: str | None = field(default=None, metadata={**MAY_CHANGE, **PATH})
    """Folder of test shards, for metrics on test images; null: found or built like data.shards."""
    resize: int | None = field(default=None, metadata=MAY_CHANGE)
    """Side to which images are center-cropped and resized (bicubic); null keeps their size."""
    background: str = field(default="white", metadata=MAY_CHANGE)
    """Background of transparent images of a folder: white, black or R,G,B."""
    holdout: float = field(default=0.0, metadata=MAY_CHANGE)
    """Fraction of a folder's images to hold out as test images, chosen by file name, if the folder
    has no test images."""
    skip_bad: bool = field(default=False, metadata=MAY_CHANGE)
    """Leave out damaged images of a folder instead of refusing the folder."""

    @property
    def options(self) -> FolderOptions:
        """Return how a folder's images are read."""
        return FolderOptions(self.background, self.holdout, self.skip_bad)


@dataclass(frozen=True)
class TrainerConfig:
    """The sections that the configurations of all families have."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig, metadata=MAY_CHANGE)


@dataclass
class Parts:
    """What a family builds from its configuration and the data."""

    nets: dict[str, nn.Module]
    objective: Objective
    optim: dict[str, OptimConfig] = field(default_factory=dict)  # by net; others use config.optim


MakeParts = Callable[[Any, tuple[int, int, int], int], Parts]
"""Builds nets and objective from a configuration, an image's shape and the number of classes."""


def run_training(
    config_class: type[TrainerConfig],
    default_config: str,
    make_parts: MakeParts,
    arguments: list[str] | None = None,
    exit_now: Callable[[], NoReturn] | None = None,
) -> int:
    """Train by the configuration of the command line, or of `arguments`; return the exit code.

    `exit_now` handles a request to stop before the first step, in place of exiting.
    """
    stop = StopRequest(exit_now=exit_now or _exit_unsaved)
    try:
        words = sys.argv[1:] if arguments is None else arguments
        config = parse(config_class, default_config, words)
        train, folder = config.train, Path(config.run.dir)
        check_folder("run.dir", folder)
        check_trackers(config.run.trackers)
        threads_before = torch.get_num_threads()
        engine = start_engine(
            train.mixed_precision, train.timeout_minutes, deterministic=train.deterministic,
            tf32=train.tf32, threads=train.threads,
        )  # fmt: skip
        watchdog, lock = Watchdog(train.timeout_minutes), RunLock(folder)
        try:
            watchdog.start()
            job, config = _prepare(config, make_parts, engine, watchdog)
            is_done = Trainer(job).train(RunFolder(config, folder, lock), stop)
            # On all processes, since a launcher ends the others as soon as one exits with code 75.
            engine.on_main(lambda: _print_outcome(engine, folder, is_done))
        except OSError as error:
            fault = disk_fault(error)
            if fault is None:
                raise
            raise UserError(f"{fault}; {_resume_point(folder)}") from error
        finally:
            engine.close()
            torch.set_num_threads(threads_before)
            watchdog.close()
            lock.release()
    except BaseException:
        stop.close()
        restore_signals()  # a launcher's SIGTERM must not turn a failure into code 75
        raise
    ignore_signals_at_exit(stop.close)
    return DONE if is_done else STOPPED


def _prepare(
    config: TrainerConfig, make_parts: MakeParts, engine: Engine, watchdog: Watchdog
) -> tuple[Job, TrainerConfig]:
    """Open the shards, built if missing; return the job, and the config naming the train shards."""
    data = config.data
    if engine.is_main:  # the others wait for it
        watchdog.set_activity("prepare")
    check_config(config.train, engine.launch)
    run = Path(config.run.dir)
    engine.on_main(RunFolder(config, run).check)  # before shards are built
    fits = functools.partial(check_memory, make_parts, config)
    same = functools.partial(check_rebuilt, run)
    path = engine.on_main(lambda: str(ensure_split(data, "train", check=fits, check_index=same)))
    images = open_shards(path, data.resize)
    fits(images.image_shape, images.num_classes)
    parts = make_parts(config, images.image_shape, images.num_classes)
    job = make_job(config, engine, images, parts)
    job.watchdog = watchdog
    if engine.is_main:
        _print_grid_limits(job)
        job.data_line = describe_shards(Path(path), images)
    return job, replace(config, data=with_absolute_paths(replace(data, shards=path)))


def _print_grid_limits(job: Job) -> None:
    """Print how many classes and images fit into the sample grids, if not all."""
    count, per_class = len(job.classes), job.config.samples_per_class
    classes, columns = grid_classes(count, per_class, *job.image_shape[:2])
    if (len(classes), columns) != (count, per_class):
        print(
            f"samples/*.png show {len(classes)} of {count} classes, evenly spaced, and {columns} "
            "images of each, as more do not fit; launch/sample.py makes all"
        )


def _exit_unsaved() -> NoReturn:
    """Exit a process that has nothing to save yet."""
    remove_unfinished()
    exit_before_first_step()


def _resume_point(folder: Path) -> str:
    saved = complete_names(folder / "checkpoints")
    return f"it continues from {int(saved[-1]):,} images" if saved else "nothing has been saved yet"


def make_job(config: TrainerConfig, engine: Engine, images: Shards, parts: Parts) -> Job:
    """Return the job of a configuration and the family's parts."""
    open_real_test = functools.partial(open_test, config.data, engine, images.classes)
    real = RealImages(images, images.num_classes, identify(images), open_real_test)
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
            k: without_password(v) if isinstance(v, str) else v for k, v in flatten(config).items()
        },
        trackers=list(config.run.trackers),
        evaluation=make_evaluation(config.eval, parts.objective, engine, real, cache_root()),
        eval_every_images=config.eval.every_images,
    )


def check_rebuilt(run: Path, index: Index) -> None:
    """Raise UserError if shards of other images would replace those of a trained run."""
    found = newest(run / "checkpoints")
    before, now = read_state(found)["data_id"] if found else None, _hash(_checksums(index))
    if before not in (None, now):
        raise UserError(
            f"run.dir {run} was trained on other images than data.source holds now (id {before}, "
            f"now {now}); no shards were replaced: use the run's images (restore them, or "
            "name its shards with --data.shards) or another run.dir"
        )


def identify(images: Shards) -> str:
    """Return a hash of the images' contents, and of their classes if these are renumbered."""
    renumbered = images.classes != images.index.classes
    return _hash(_checksums(images.index) + [json.dumps(images.classes)] * renumbered)


def all_ids(images: Shards) -> tuple[str, ...]:
    """Return the ids that runs may have recorded for these images, those of older code included."""
    return (_hash(_checksums(images.index)), *former_ids(images))


def _checksums(index: Index) -> list[str]:
    return [f"{shard.count}:{shard.sha256}" for shard in index.shards]


def former_ids(images: Shards) -> tuple[str, ...]:
    """Return the ids that older versions gave to the same images.

    Those versions left out the checksums of tars without an index.json.
    """
    if (images.folder / INDEX).is_file():
        return ()
    return (_hash([f"{shard.count}:" for shard in images.index.shards]),)


def _hash(sums: list[str]) -> str:
    return hashlib.sha256("\n".join(sums).encode()).hexdigest()[:16]


def ensure_split(
    data: DataConfig,
    split: str,
    classes: Sequence[str] | None = None,
    check: CheckImages | None = None,
    check_index: CheckIndex | None = None,
) -> Path:
    """Return the folder of a run's train or test shards, checked; build them if missing.

    classes: those of the train images, by which labels of test images are numbered; check: called
    with the images' shape and number of classes before anything is built; check_index: called with
    the new index before shards that are built again replace the older ones.
    """
    given = data.shards if split == "train" else data.test_shards
    # A run's config.yaml names its train shards; the test shards lie in the same folder.
    root = _parent_of_built(data) if split == "test" else None
    return ensure(
        data.source, given, split, data.resize, options=data.options, root=root,
        classes=classes, check=check, check_index=check_index,
    )  # fmt: skip


def _parent_of_built(data: DataConfig) -> Path | None:
    """Return the parent folder of data.shards if a trainer built them by default, else None."""
    if data.shards is None:
        return None
    shards = Path(os.path.expanduser(data.shards))
    try:
        name = default_folder(data.source, "train", data.resize, data.options).name
    except UserError:  # an unknown source: the shards come from elsewhere
        return None
    return shards.parent if shards.name == name else None


def with_absolute_paths(data: DataConfig) -> DataConfig:
    """Make paths absolute, so that they hold in any working directory."""
    shards, test_shards = _absolute(data.shards), _absolute(data.test_shards)
    source = source_name(data.source) if data.source.startswith("folder:") else data.source
    return replace(data, source=source, shards=shards, test_shards=test_shards)


def _absolute(path: str | None) -> str | None:
    return path if path is None or is_remote(path) else os.path.abspath(os.path.expanduser(path))


def open_test(data: DataConfig, engine: Engine, classes: Sequence[str]) -> Shards:
    """Open the test images of a data set, built if missing.

    classes: those of the train images, by which labels are numbered.
    """
    if data.test_shards is None and data.shards is not None and _parent_of_built(data) is None:
        raise UserError(
            f"data.shards is {data.shards}, but data.test_shards is not given: name the shards of "
            "its test images, or set eval.every_images 0"
        )
    path = engine.on_main(lambda: str(ensure_split(data, "test", classes)))
    return open_shards(path, data.resize, classes)


def _print_outcome(engine: Engine, folder: Path, is_done: bool) -> None:
    with naming(folder / "tensorboard"):
        engine.finish_trackers()
    curve = save_loss_curve(folder)
    if is_done:
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
                    label = "highest:" if best.get("best") == "max" else "lowest:"
                    images = f"{best['images_seen']:,} images"
                    print(f"{label:12} {name} {best['value']:.4f} after {images}")
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            warnings.warn(f"{path} is damaged; the next log replaces it", stacklevel=2)
