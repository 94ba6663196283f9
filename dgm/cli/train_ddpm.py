"""Train a class-conditional diffusion model: `accelerate launch launch/train_ddpm.py`."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch

from dgm.cli.assemble import Parts, TrainerConfig, run_training
from dgm.common.config_keys import MAY_CHANGE
from dgm.diffusion.objective import DiffusionConfig, DiffusionObjective, DiffusionSampleConfig
from dgm.diffusion.unet import UNet, UNetConfig
from dgm.training.job import noising_mode

DEFAULT_CONFIG = "ddpm_cifar10.yaml"


@dataclass(frozen=True)
class Config(TrainerConfig):
    """Train a class-conditional diffusion model (DDPM and its later variants)."""

    model: UNetConfig = field(default_factory=UNetConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    sample: DiffusionSampleConfig = field(
        default_factory=DiffusionSampleConfig, metadata=MAY_CHANGE
    )


def make_parts(config: Config, image_shape: tuple[int, int, int], num_classes: int) -> Parts:
    """Build the U-Net, its weights drawn from the run's seed, and its objective."""
    dtype = config.train.dtype
    objective = DiffusionObjective(
        config.diffusion,
        config.sample,
        image_shape,
        num_classes,
        backend=noising_mode(config.train),
        dtype=dtype,
    )
    torch.manual_seed(config.run.seed)  # only the initial weights use torch's generator
    net = UNet(
        config.model,
        image_shape[0],
        image_shape[2],
        image_shape[2] * (2 if config.diffusion.learned_variance else 1),
        objective.num_classes,
    )
    return Parts({"net": net.to(dtype)}, objective)


main = functools.partial(run_training, Config, DEFAULT_CONFIG, make_parts)
"""Train by the configuration of the command line."""
