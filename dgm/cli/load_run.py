"""Load the nets of a run's checkpoint, and the images that it was trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from dgm.cli.assemble import Parts, all_ids, identify
from dgm.cli.parser import family_module, family_of, open_config
from dgm.common.errors import UserError
from dgm.common.run_files import hint_at_runs
from dgm.objective import Objective
from dgm.training import checkpoint
from dgm.training.engine import Engine
from dgm.training.state_dicts import in_channels_last, load_nets
from shards.reader import Shards, open_shards
from shards.remote import is_remote


@dataclass
class TrainedRun:
    """Nets of a checkpoint with what is needed to use them."""

    family: str
    objective: Objective
    nets: dict[str, nn.Module]  # on the CPU, frozen
    classes: list[str]
    images_seen: int
    fingerprint: str = ""  # hash of the checkpoint's contents
    data_id: str = ""  # hash of the train images
    image_shape: tuple[int, int, int] | None = None


def _parse_checkpoint(text: str | None) -> int | Literal["best"] | None:
    """Return the value of --checkpoint; raise UserError unless it is a number or `best`."""
    if text is None:
        return None
    if text == "best":
        return "best"
    if not text.isdecimal():
        raise UserError(f"--checkpoint is {text}: give its number of images seen, or best")
    return int(text)


def load_run(
    folder: Path,
    images_seen: int | Literal["best"] | None = None,
    average: bool = True,
    replace: Callable[[Parts], Parts] = lambda parts: parts,
) -> TrainedRun:
    """Load the newest complete checkpoint of a run folder, that of `images_seen`, or the best.

    `average` loads the moving average of the weights; `replace` exchanges nets or objective. Raise
    UserError if there is no such checkpoint.
    """
    config = folder / "config.yaml"
    if not config.is_file():
        raise UserError(f"{folder} is not a run folder (no config.yaml): {hint_at_runs(folder)}")
    if images_seen is None:
        loaded, fingerprint = _read_newest(folder)
    else:
        seen = _best(folder) if images_seen == "best" else images_seen
        loaded, fingerprint = _read_one(folder, seen)
    state, family = loaded.state, family_of(config)
    image_shape, classes = tuple(state["image_shape"]), state["classes"]
    made = family_module(family).make_parts(open_config(config), image_shape, len(classes))
    parts = replace(made)
    load_nets(parts.nets, loaded.model)
    if average:
        averaged = {key.split(".")[0] for key in loaded.ema}
        load_nets({name: parts.nets[name] for name in averaged & parts.nets.keys()}, loaded.ema)
    nets = {
        name: in_channels_last(net).eval().requires_grad_(False) for name, net in parts.nets.items()
    }
    return TrainedRun(
        family, parts.objective, nets, classes, state["images_seen"], fingerprint,
        state["data_id"], image_shape,
    )  # fmt: skip


def load_run_on_all(
    engine: Engine, folder: Path, text: str | None, average: bool = True
) -> TrainedRun:
    """Load the checkpoint of a --checkpoint option, the same on all ranks even during training.

    Collective: call on all ranks.
    """
    loaded: list[TrainedRun] = []

    def load() -> int:
        loaded.append(load_run(folder, _parse_checkpoint(text), average))
        return loaded[0].images_seen

    seen = engine.on_main(load)
    return loaded[0] if loaded else load_run(folder, seen, average)


def open_train_data(folder: Path, trained: TrainedRun) -> tuple[Shards, dict[str, Any]]:
    """Return the images of a run, with the class numbers of its training, and its `data` section.

    Raise UserError if they are missing, or differ from those of the checkpoint.
    """
    path = folder / "config.yaml"
    settings = asdict(open_config(path).data)
    where, test = settings.get("shards"), str(settings.get("test_shards"))
    # A run records a folder here; anything else in a run of unknown origin could be a command.
    if not isinstance(where, str) or is_remote(where):
        raise UserError(f"{path} has data.shards {where}: name the folder of its train shards")
    if test.startswith("pipe:"):
        raise UserError(f"{path} has data.test_shards {test}: name a folder or an address")
    try:
        images = open_shards(where, settings["resize"])
        if settings["resize"] is not None and images.image_shape != trained.image_shape:
            # Older versions ignored data.resize for given shards.
            settings["resize"] = None
            images = open_shards(where)
    except UserError as error:
        raise UserError(
            f"{folder} was trained on data.shards {where}: {error}, or put them back"
        ) from None
    if trained.data_id not in all_ids(images):
        raise UserError(
            f"{folder} was trained on other images than data.shards {where} holds now (id "
            f"{trained.data_id}, now {identify(images)}): restore them as they were then, or "
            f"name their shards as data.shards in {path}"
        )
    return open_shards(where, settings["resize"], trained.classes), settings


def _read_one(folder: Path, seen: int) -> tuple[checkpoint.Checkpoint, str]:
    path = folder / "checkpoints" / f"{seen:09d}"
    if not path.is_dir():
        complete = [int(name) for name in checkpoint.complete_names(path.parent)]
        raise UserError(
            f"{folder} has no checkpoint after {seen} images: choose "
            f"{', '.join(map(str, complete))}, or none for the newest"
            if complete
            else f"{folder} holds no complete checkpoint yet: train it first"
        )
    if (fault := checkpoint.find_fault(path)) is not None:
        raise UserError(f"checkpoint {path} cannot be used ({fault}): choose another")
    try:
        return _read(path)
    except FileNotFoundError:
        raise UserError(
            f"checkpoint {path} was removed while it was read, as the trainer keeps only "
            "the newest ones: choose another, or none for the newest"
        ) from None


def _read_newest(folder: Path) -> tuple[checkpoint.Checkpoint, str]:
    while (path := checkpoint.newest(folder / "checkpoints")) is not None:
        try:
            return _read(path)
        except FileNotFoundError:
            # The trainer is still running and removed it, so it has written newer ones.
            if path.exists():
                raise
    raise UserError(f"{folder} holds no complete checkpoint yet: train it first")


def _read(path: Path) -> tuple[checkpoint.Checkpoint, str]:
    manifest = (path / checkpoint.MANIFEST).read_bytes()
    return checkpoint.read(path), hashlib.sha256(manifest).hexdigest()[:12]


def _best(folder: Path) -> int:
    newest = checkpoint.newest(folder / "checkpoints")
    best = None if newest is None else checkpoint.read_state(newest).get("best")
    if best is None:
        raise UserError(
            f"{folder} has no best checkpoint, as it was trained without evaluation: "
            "train with eval.every_images, or choose another checkpoint"
        )
    return best["images_seen"]
