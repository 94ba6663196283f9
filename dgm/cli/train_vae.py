"""Train a variational autoencoder: `accelerate launch launch/train_vae.py`."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from dgm.cli.assemble import DataConfig, Parts, run_training
from dgm.common.config_keys import MAY_CHANGE
from dgm.evaluation.online_eval import EvalConfig
from dgm.training.job import TrainConfig
from dgm.training.optimizer import OptimConfig
from dgm.training.run_folder import RunConfig
from dgm.vae.networks import VAE, VAENetConfig
from dgm.vae.objective import VAEConfig, VAEObjective, VAESampleConfig

DEFAULT_CONFIG = "vae_1_plain.yaml"


@dataclass(frozen=True)
class Config:
    """Train a variational autoencoder of one of four architectures."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: VAENetConfig = field(default_factory=VAENetConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: VAESampleConfig = field(default_factory=VAESampleConfig, metadata=MAY_CHANGE)
    eval: EvalConfig = field(
        default_factory=lambda: EvalConfig(metric="bits_per_dim"), metadata=MAY_CHANGE
    )


def make_parts(config: Config, image_shape: tuple[int, int, int], num_classes: int) -> Parts:
    """Build encoder and decoder, their weights drawn from the run's seed, and their objective."""
    dtype = config.train.dtype
    objective = VAEObjective(config.vae, config.sample, config.model.latent, dtype)
    torch.manual_seed(config.run.seed)  # only the initial weights use torch's generator
    net = VAE(config.model, image_shape, pixel_scale=config.vae.scale == "pixel")
    return Parts({"vae": net.to(dtype)}, objective)


def main() -> int:
    """Train by the configuration of the command line."""
    return run_training(Config, DEFAULT_CONFIG, make_parts)
