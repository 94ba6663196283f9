"""Check runs before slurm.submit submits them: `python launch/preflight.py < REQUEST`.

The request is JSON: `script` (launch/train_X.py), `sets` (command lines by name), `processes`
(numbers of processes that a run may get) and `build` (whether to build missing shards). The
answer is JSON too: for each set either `error`, or a description of the run.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

from dgm.cli.assemble import DataConfig, check_rebuilt, ensure_split
from dgm.cli.memory_check import build_on_meta
from dgm.cli.parser import TRAINERS, family_module, parse
from dgm.common.errors import UserError
from dgm.training.job import TrainConfig, check_config, check_micro_batches
from dgm.training.launch_env import read_launch
from dgm.training.run_folder import as_yaml, describe_code
from dgm.training.sampler import BatchSampler
from shards.build import CheckImages, CheckIndex, default_folder
from shards.format import INDEX
from shards.reader import Shards, open_shards

_COPIES = 4  # in a checkpoint: weights, their average, two moments


def main() -> None:
    """Answer the request."""
    request = json.load(sys.stdin)
    families = {f"train_{name}.py": family for family, name in TRAINERS.items()}
    family = families.get(Path(request["script"]).name)
    answers = {}
    for name, words in request["sets"].items():
        try:
            if family is None:
                known = ", ".join(f"launch/{script}" for script in families)
                raise UserError(f"{request['script']} is not a trainer: choose {known}")
            with contextlib.redirect_stdout(sys.stderr):  # output of building shards
                module = family_module(family)
                answers[name] = examine(module, words, request["processes"], request["build"])
        except UserError as error:
            answers[name] = {"error": " ".join(str(error).split())}
    json.dump(answers, sys.stdout)


def examine(module: Any, words: list[str], processes: list[int], build: bool) -> dict[str, Any]:
    """Return a description of the run with this command line; raise UserError for a mistake."""
    config = parse(module.Config, module.DEFAULT_CONFIG, words)
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    precision = config.train.mixed_precision
    check_config(config.train, read_launch(launched if precision == "auto" else precision))
    answer = {
        "run_dir": config.run.dir,
        "config": as_yaml(config),
        "code": describe_code(),
        "keep_checkpoints": config.train.keep_checkpoints,
        "global_batch": config.train.global_batch,
    }
    fits = functools.partial(build_on_meta, module.make_parts, config)
    same = functools.partial(check_rebuilt, Path(config.run.dir))
    images = find_shards(config.data, "train", build, check=fits, check_index=same)
    needs_test = config.eval.every_images and config.eval.metric == "bits_per_dim"
    if needs_test and (config.data.shards is None or config.data.test_shards):
        find_shards(config.data, "test", build, None if images is None else images.classes)
    if images is None:  # they are not built yet
        return {**answer, "processes": processes, "checkpoint_bytes": 0, "shards": "to be built"}
    parts, weights = fits(images.image_shape, images.num_classes)
    return {
        **answer,
        "processes": usable_processes(config.train, parts.objective, images, processes),
        "checkpoint_bytes": _COPIES * weights,
        "shards": f"{len(images)} images, all intact",
    }


def usable_processes(
    train: TrainConfig, objective: Any, images: Shards, processes: list[int]
) -> list[int]:
    """Return the numbers of processes that divide the batch; raise UserError if none does."""
    found, mistake = [], None
    for count in processes:
        try:
            batches = BatchSampler(images, 0, train.global_batch, train.micro_batch, 0, count)
            check_micro_batches(objective, batches)
            found.append(count)
        except UserError as error:
            mistake = mistake or error
    if not found and mistake is not None:
        raise mistake
    return found


def find_shards(
    data: DataConfig,
    split: str,
    build: bool,
    classes: tuple[str, ...] | None = None,
    check: CheckImages | None = None,
    check_index: CheckIndex | None = None,
) -> Shards | None:
    """Return a run's shards, verified; None if they are not built yet.

    classes: of the train images, for test images; check, check_index: see `ensure_split`.
    """
    given = data.shards if split == "train" else data.test_shards
    if given is None and not build:
        folder = default_folder(data.source, split, data.resize, data.options)
        if not (folder / INDEX).is_file():
            return None
    key = (data, split, classes)
    if key not in _opened:  # the sets of a sweep mostly share their images
        folder = ensure_split(data, split, classes, check, check_index)
        _opened[key] = open_shards(folder, data.resize, classes)
    return _opened[key]


_opened: dict[tuple[DataConfig, str, tuple[str, ...] | None], Shards] = {}
