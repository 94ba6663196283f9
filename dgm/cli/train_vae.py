"""Train a variational autoencoder: `accelerate launch launch/train_vae.py`."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch

from dgm.cli.assemble import Parts, TrainerConfig, run_training
from dgm.common.config_keys import MAY_CHANGE
from dgm.evaluation.online_eval import EvalConfig
from dgm.vae.networks import VAE, VAENetConfig
from dgm.vae.objective import VAEConfig, VAEObjective, VAESampleConfig

DEFAULT_CONFIG = "vae_1_plain.yaml"


@dataclass(frozen=True)
class Config(TrainerConfig):
    """Train a variational autoencoder of one of four architectures."""

    model: VAENetConfig = field(default_factory=VAENetConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
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


main = functools.partial(run_training, Config, DEFAULT_CONFIG, make_parts)
"""Train by the configuration of the command line."""
