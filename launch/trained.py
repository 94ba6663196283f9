"""Opening what a run has trained."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from dgm.errors import UserError
from dgm.objective import Objective
from dgm.train import checkpoint
from dgm.train.weights import in_channels_last, load_nets
from launch.families import open_config, rebuild
from launch.training import identify, known_as
from shards.errors import ShardError
from shards.read import Shards, open_shards
from shards.remote import is_remote

_MOST_RUNS = 1000  # that are looked through for one with a name like the one given


@dataclass
class Trained:
    """Nets of a checkpoint with what is needed to use them."""

    family: str
    objective: Objective
    nets: dict[str, nn.Module]  # on the CPU, frozen
    classes: list[str]
    images_seen: int
    fingerprint: str = ""  # of the checkpoint's contents
    data_id: str = ""  # of the train images
    image_shape: tuple[int, int, int] | None = None


def open_trained(
    folder: Path, images_seen: int | Literal["best"] | None = None, average: bool = True
) -> Trained:
    """Open the newest whole checkpoint of a run folder, that of `images_seen`, or the best.

    `average` takes the moving average of the weights. Raises UserError where there is none.
    """
    config = folder / "config.yaml"
    if not config.is_file():
        raise UserError(f"{folder} is not a run folder (no config.yaml): {hint_at_runs(folder)}")
    saved = folder / "checkpoints"
    if images_seen is None:
        loaded, fingerprint = _read_newest(folder)
    else:
        seen = _best(folder) if images_seen == "best" else images_seen
        path = saved / f"{seen:09d}"
        if not path.is_dir():
            raise UserError(_no_checkpoint(folder, seen))
        fault = checkpoint.find_fault(path)
        if fault is not None:
            raise UserError(f"checkpoint {path} cannot be used ({fault}): choose another")
        try:
            loaded, fingerprint = _read(path)
        except FileNotFoundError:
            raise UserError(
                f"checkpoint {path} was removed while it was read, for a run at work keeps its "
                "newest ones only: choose another, or none for the newest"
            ) from None
    height, width, channels = loaded.state["image_shape"]
    classes = loaded.state["classes"]
    family, parts = rebuild(config, (height, width, channels), len(classes))
    load_nets(parts.nets, loaded.full.model)
    if average:
        averaged = {key.split(".")[0] for key in loaded.ema}
        load_nets({name: parts.nets[name] for name in averaged & parts.nets.keys()}, loaded.ema)
    nets = {name: in_channels_last(net).eval() for name, net in parts.nets.items()}
    for net in nets.values():
        net.requires_grad_(False)
    seen = loaded.state["images_seen"]
    data_id, shape = loaded.state["data_id"], (height, width, channels)
    return Trained(family, parts.objective, nets, classes, seen, fingerprint, data_id, shape)


def hint_at_runs(folder: Path) -> str:
    """Return which run may be meant by a folder that is none: around it, or under runs/."""
    around = next((p for p in folder.parents if (p / "config.yaml").is_file()), None)
    if around is not None:
        return f"did you mean {around}?"
    inside = sorted(_runs_under(folder))
    if inside:
        return f"it holds runs, name one: {', '.join(map(str, inside[:5]))}"
    for root in (folder.parent, Path("runs")):
        # Without what all have in common, by which long paths would be alike.
        wanted = folder.relative_to(root) if folder.is_relative_to(root) else Path(folder.name)
        names = {run.name: run for run in _runs_under(root)}
        names |= {str(run.relative_to(root)): run for run in _runs_under(root)}
        near = difflib.get_close_matches(str(wanted), names, 1, cutoff=0.6)
        if near:
            return f"did you mean {names[near[0]]}?"
    if next(_runs_under(Path("runs")), None) is None:
        return "runs/ holds no run: train one first, or give the path of one"
    return "name one of runs/"


def _runs_under(root: Path) -> Iterator[Path]:
    """Go through the run folders in a folder, and those of sweeps in it."""
    with contextlib.suppress(OSError):
        for pattern in ("*/config.yaml", "*/*/config.yaml"):
            yield from (path.parent for path in itertools.islice(root.glob(pattern), _MOST_RUNS))


def _no_checkpoint(folder: Path, seen: int) -> str:
    there = [int(name) for name in checkpoint.complete_names(folder / "checkpoints")]
    if not there:
        return f"{folder} holds no whole checkpoint yet: train it first"
    known = ", ".join(map(str, there))
    return f"{folder} has no checkpoint after {seen} images: choose {known}, or none for the newest"


def open_data(folder: Path, trained: Trained) -> tuple[Shards, dict[str, Any]]:
    """Open the images that a run was trained on, labels numbered as then; and its data settings.

    Raises UserError where they are not there, or are others than those of the checkpoint.
    """
    path = folder / "config.yaml"
    found = asdict(open_config(path).data)
    where, test = found.get("shards"), str(found.get("test_shards"))
    # A run notes the folder that it read. What somebody else wrote there could be a command.
    if not isinstance(where, str) or is_remote(where):
        raise UserError(f"{path} has data.shards {where}: name the folder of its train shards")
    if test.startswith("pipe:"):
        raise UserError(f"{path} has data.test_shards {test}: name a folder or an address")
    try:
        images = open_shards(where, found["resize"])
        if found["resize"] is not None and images.image_shape != trained.image_shape:
            # Older versions took shards as they were, whatever data.resize was.
            found["resize"] = None
            images = open_shards(where)
    except ShardError as error:
        raise UserError(
            f"{folder} was trained on data.shards {where}: {error}, or put them back"
        ) from None
    if trained.data_id not in known_as(images):
        raise UserError(
            f"{folder} was trained on other images than data.shards {where} holds now (id "
            f"{trained.data_id}, now {identify(images)}): restore them as they were then, or "
            f"name their shards as "
            f"data.shards in {path}"
        )
    return open_shards(where, found["resize"], trained.classes), found


def _read_newest(folder: Path) -> tuple[checkpoint.Checkpoint, str]:
    while (path := checkpoint.newest(folder / "checkpoints")) is not None:
        try:
            return _read(path)
        except FileNotFoundError:
            # A run at work has removed it meanwhile, and so has written newer ones.
            if path.exists():
                raise
    raise UserError(f"{folder} holds no whole checkpoint yet: train it first")


def _read(path: Path) -> tuple[checkpoint.Checkpoint, str]:
    manifest = (path / checkpoint.MANIFEST).read_bytes()
    return checkpoint.read(path), hashlib.sha256(manifest).hexdigest()[:12]


def _best(folder: Path) -> int:
    newest = checkpoint.newest(folder / "checkpoints")
    best = None if newest is None else checkpoint.read_state(newest).get("best")
    if best is None:
        raise UserError(
            f"{folder} has no best checkpoint, for nothing was measured as it went: "
            "train with eval.every_images, or choose another checkpoint"
        )
    return best["images_seen"]
