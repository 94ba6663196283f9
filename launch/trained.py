"""Opening what a run has trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from dgm.errors import UserError
from dgm.objective import Objective
from dgm.train import checkpoint
from dgm.train.engine import in_channels_last, load_nets
from launch import train_ddpm
from launch.command import parse


@dataclass
class Trained:
    """Nets of a checkpoint with what is needed to use them."""

    objective: Objective
    nets: dict[str, nn.Module]  # on the CPU, frozen
    classes: list[str]
    images_seen: int


def open_trained(folder: Path, images_seen: int | None = None, average: bool = True) -> Trained:
    """Open the newest whole checkpoint of a run folder, or that of `images_seen`.

    `average` takes the moving average of the weights. Raises UserError where there is none.
    """
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} is not a run folder (no config.yaml): name one of runs/")
    saved = folder / "checkpoints"
    path = checkpoint.newest(saved) if images_seen is None else saved / f"{images_seen:09d}"
    if path is None:
        raise UserError(f"{folder} holds no whole checkpoint yet: train it first")
    fault = checkpoint.find_fault(path)
    if fault is not None:
        raise UserError(f"checkpoint {path} cannot be used ({fault}): choose another")
    loaded = checkpoint.read(path)
    config = parse(train_ddpm.Config, "", ["--config", str(folder / "config.yaml")])
    height, width, channels = loaded.state["image_shape"]
    classes = loaded.state["classes"]
    parts = train_ddpm.make_parts(config, (height, width, channels), len(classes))
    load_nets(parts.nets, loaded.ema if average else loaded.full.model)
    nets = {name: in_channels_last(net).eval() for name, net in parts.nets.items()}
    for net in nets.values():
        net.requires_grad_(False)
    return Trained(parts.objective, nets, classes, loaded.state["images_seen"])
