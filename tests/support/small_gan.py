"""Small GANs, and batches for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dgm.gan.networks import GanNetConfig, make_nets
from dgm.gan.objective import GanConfig, GanObjective, GanSampleConfig
from dgm.objective import Batch
from dgm.rng import Draws

NUM_CLASSES, LATENT = 3, 6
ARCHITECTURES = ("dcgan", "residual")


def objective(
    dtype: torch.dtype = torch.float64, sees_batch: bool = True, **config: Any
) -> GanObjective:
    given = (GanConfig(**config), GanSampleConfig(), LATENT, NUM_CLASSES, dtype)
    return GanObjective(*given, sees_batch=sees_batch)


def nets(
    architecture: Any = "dcgan",
    classes: int | None = None,
    side: int = 8,
    width: int = 4,
    batch_norm: bool = True,
) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    config = GanNetConfig(architecture, LATENT, width, width, batch_norm)
    return {k: net.double() for k, net in make_nets(config, (side, side, 3), classes).items()}


def batch(count: int, step: int = 0) -> tuple[Batch, Draws]:
    index = torch.arange(count)
    images = Draws.of(9, index).uniform("noise", (8, 8, 3)).mul(256).byte()
    return Batch(images, index % NUM_CLASSES, step * count, step), Draws.of(0, index)


def loss(
    made: GanObjective, own: dict[str, nn.Module], given: tuple[Batch, Draws], phase: int
) -> dict[str, Tensor]:
    return made.loss(own, given[0], made.phases[phase], given[1])
