"""Opening what a run has trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import nn

from dgm.errors import UserError
from dgm.objective import Objective
from dgm.train import checkpoint
from dgm.train.weights import in_channels_last, load_nets
from launch.families import rebuild


@dataclass
class Trained:
    """Nets of a checkpoint with what is needed to use them."""

    family: str
    objective: Objective
    nets: dict[str, nn.Module]  # on the CPU, frozen
    classes: list[str]
    images_seen: int


def open_trained(
    folder: Path, images_seen: int | Literal["best"] | None = None, average: bool = True
) -> Trained:
    """Open the newest whole checkpoint of a run folder, that of `images_seen`, or the best.

    `average` takes the moving average of the weights. Raises UserError where there is none.
    """
    config = folder / "config.yaml"
    if not config.is_file():
        raise UserError(f"{folder} is not a run folder (no config.yaml): name one of runs/")
    saved = folder / "checkpoints"
    path = checkpoint.newest(saved) if isinstance(images_seen, str | None) else None
    if images_seen == "best":
        images_seen = _best(folder, path)
    if isinstance(images_seen, int):
        path = saved / f"{images_seen:09d}"
    if path is None:
        raise UserError(f"{folder} holds no whole checkpoint yet: train it first")
    fault = checkpoint.find_fault(path)
    if fault is not None:
        raise UserError(f"checkpoint {path} cannot be used ({fault}): choose another")
    loaded = checkpoint.read(path)
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
    return Trained(family, parts.objective, nets, classes, loaded.state["images_seen"])


def _best(folder: Path, newest: Path | None) -> int:
    best = None if newest is None else checkpoint.read_state(newest).get("best")
    if best is None:
        raise UserError(
            f"{folder} has no best checkpoint, for nothing was measured as it went: "
            "train with eval.every_images, or choose another checkpoint"
        )
    return best["images_seen"]
