"""Train a GAN: `accelerate launch launch/train_gan.py`."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace

import torch

from dgm.cli.assemble import Parts, TrainerConfig, run_training
from dgm.common.config_keys import MAY_CHANGE
from dgm.gan.networks import GanNetConfig, make_nets
from dgm.gan.objective import GanConfig, GanObjective, GanSampleConfig

DEFAULT_CONFIG = "dcgan_cifar10.yaml"


@dataclass(frozen=True)
class Config(TrainerConfig):
    """Train a GAN (DCGAN, or a residual pair with spectral norm)."""

    model: GanNetConfig = field(default_factory=GanNetConfig)
    gan: GanConfig = field(default_factory=GanConfig)
    sample: GanSampleConfig = field(default_factory=GanSampleConfig, metadata=MAY_CHANGE)


def make_parts(config: Config, image_shape: tuple[int, int, int], num_classes: int) -> Parts:
    """Build both nets, their weights drawn from the run's seed, and their objective."""
    dtype = config.train.dtype
    objective = GanObjective(
        config.gan,
        config.sample,
        config.model.latent,
        num_classes,
        dtype,
        sees_batch=config.model.discriminator_sees_batch,
    )
    torch.manual_seed(config.run.seed)  # only the initial weights use torch's generator
    nets = make_nets(config.model, image_shape, objective.num_classes)
    lr = config.gan.discriminator_lr
    optim = {} if lr is None else {"discriminator": replace(config.optim, lr=lr)}
    return Parts({name: net.to(dtype) for name, net in nets.items()}, objective, optim)


main = functools.partial(run_training, Config, DEFAULT_CONFIG, make_parts)
"""Train by the configuration of the command line."""
