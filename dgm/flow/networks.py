"""The multi-scale flow: RealNVP (Dinh et al. 2017) and Glow (Kingma and Dhariwal 2018)."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from dgm.common.errors import UserError
from dgm.common.validation import check_range
from dgm.flow.bijections import ActNorm, Chain, InvertibleConv, Logit, Squeeze
from dgm.flow.coupling import Checkerboard, Coupling, conv_net, residual_net
from dgm.nn.layers import zeroed


@dataclass(frozen=True)
class FlowNetConfig:
    """Shape of the flow; the defaults are Glow's for CIFAR-10 (44 M parameters)."""

    architecture: Literal["glow", "realnvp"] = "glow"
    """`glow`: actnorm, 1x1 convolution, coupling; `realnvp`: checkerboards and channel halves."""
    levels: int = 3
    """Number of scales; after each but the last, half of the values are factored out."""
    steps: int = 32
    """Couplings per level; in realnvp per mask, and one more at the last level."""
    hidden: int = 512
    """Width of the networks inside couplings."""
    blocks: int = 8
    """Residual blocks of each network inside a coupling (realnvp)."""
    coupling: Literal["affine", "additive"] = "affine"
    """`affine` scales and shifts, `additive` only shifts."""
    logit: float = 0.0
    """Apply a logit to pixels kept this far from 0 and 1 (RealNVP: 0.05); 0 for none."""


class Flow(nn.Module):
    """Map images [B, C, H, W] in [-1, 1] to standard normal z [B, C H W], and back.

    Half of a level's output is factored out. The level's last layer standardizes it given the other
    half (Glow's learned prior). RealNVP has actnorm after each coupling, where the paper has batch
    norm, so that an image's likelihood depends on no other image.
    """

    def __init__(self, config: FlowNetConfig, image_shape: tuple[int, int, int]):
        """Build for images of shape (H, W, C); raise UserError where sizes do not fit."""
        super().__init__()
        _check(config, image_shape)
        make_level = _glow_level if config.architecture == "glow" else _realnvp_level
        shape = image_shape
        levels: list[nn.Module] = []
        self.shapes: list[tuple[int, int, int]] = []  # (H, W, C) of each part of z
        for number in range(config.levels):
            last = number == config.levels - 1
            layers = OrderedDict[str, nn.Module]()
            if number == 0 and config.logit > 0:
                layers["logit"] = Logit(config.logit)
            height, width, channels = make_level(config, shape, last, layers)
            shape = (height, width, channels if last else channels // 2)
            levels.append(Chain(layers))
            self.shapes.append(shape)
        self.levels = nn.ModuleList(levels)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map images to z and log_det [B]; the parts of z are in the order of factoring out."""
        log_det = x.new_zeros(len(x))
        parts = []
        for number, level in enumerate(self.levels):
            x, level_log_det = level(x)
            log_det = log_det + level_log_det
            if number < len(self.levels) - 1:
                x, factored_out = x.chunk(2, dim=1)
                parts.append(factored_out)
        # Channels last, the order in memory.
        flat = [part.permute(0, 2, 3, 1).flatten(1) for part in (*parts, x)]
        return torch.cat(flat, dim=1), log_det

    def inverse(self, z: Tensor) -> Tensor:
        """Map z to images in about [-1, 1]."""
        flat = z.split([math.prod(shape) for shape in self.shapes], dim=1)
        parts = [
            part.reshape(-1, *shape).permute(0, 3, 1, 2)
            for part, shape in zip(flat, self.shapes, strict=True)
        ]
        x = parts.pop()
        for level in reversed(list(self.levels)):
            x = cast(Chain, level).inverse(x)
            if parts:
                x = torch.cat([x, parts.pop()], dim=1)
        return x


def normal_log_prob(z: Tensor) -> Tensor:
    """Return log N(z; 0, I) of z [B, D], nats [B]."""
    return -0.5 * (z.square().sum(1) + z.shape[1] * math.log(2 * math.pi))


def _glow_level(
    config: FlowNetConfig,
    shape: tuple[int, int, int],
    last: bool,
    layers: OrderedDict[str, nn.Module],
) -> tuple[int, int, int]:
    """Add the layers of a level for images (H, W, C); return the shape of its output."""
    height, width, channels = shape[0] // 2, shape[1] // 2, 4 * shape[2]
    layers["squeeze"] = Squeeze()
    for step in range(config.steps):
        outputs = _num_parameters(channels // 2, config)
        net = conv_net(channels // 2, outputs, config.hidden)
        layers[f"step{step}"] = Chain(
            OrderedDict(
                actnorm=ActNorm(channels), mix=InvertibleConv(channels), coupling=Coupling(net)
            )
        )
    if last:
        layers["prior"] = ActNorm(channels)
    else:
        layers["prior"] = Coupling(zeroed(nn.Conv2d(channels // 2, channels, 3, padding=1)))
    return height, width, channels


def _realnvp_level(
    config: FlowNetConfig,
    shape: tuple[int, int, int],
    last: bool,
    layers: OrderedDict[str, nn.Module],
) -> tuple[int, int, int]:
    """Add the layers of a level for images (H, W, C); return the shape of its output."""
    height, width, channels = shape

    def net(channels: int) -> nn.Module:
        outputs = _num_parameters(channels, config)
        return residual_net(channels, outputs, config.hidden, config.blocks)

    for step in range(config.steps + last):
        board = Checkerboard(net(channels), height, width, odd=step % 2 == 1)
        layers[f"checkerboard{step}"] = Chain(
            OrderedDict(coupling=board, actnorm=ActNorm(channels))
        )
    if last:
        return shape
    layers["squeeze"] = Squeeze()
    channels *= 4
    for step in range(config.steps):
        halves = Coupling(net(channels // 2), swap=step % 2 == 1)
        layers[f"halves{step}"] = Chain(OrderedDict(coupling=halves, actnorm=ActNorm(channels)))
    return height // 2, width // 2, channels


def _num_parameters(channels: int, config: FlowNetConfig) -> int:
    return channels * (2 if config.coupling == "affine" else 1)


def _check(config: FlowNetConfig, image_shape: tuple[int, int, int]) -> None:
    check_range(config, "model.", "hidden", min=1)
    check_range(config, "model.", "levels", "steps", "blocks", min=1, max=1000)
    if not 0 <= config.logit < 0.5:
        raise UserError(f"model.logit is {config.logit}: choose 0 (none) or more, less than 0.5")
    height, width, _ = image_shape
    halvings = config.levels - (config.architecture == "realnvp")
    if height % 2**halvings or width % 2**halvings:
        raise UserError(
            f"images of {height} x {width} cannot be halved {halvings} times, as model.levels "
            f"{config.levels} of model.architecture {config.architecture!r} requires: "
            "lower model.levels or resize the images"
        )
    if config.architecture == "realnvp" and height * width == 4**halvings:
        raise UserError(
            f"model.levels {config.levels} leaves one pixel of images of {height} x {width}, "
            "too few for a checkerboard: lower it"
        )
