"""Train a normalizing flow: `accelerate launch launch/train_flow.py`."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch

from dgm.cli.assemble import Parts, TrainerConfig, run_training
from dgm.common.config_keys import MAY_CHANGE
from dgm.evaluation.online_eval import EvalConfig
from dgm.flow.networks import Flow, FlowNetConfig
from dgm.flow.objective import FlowConfig, FlowObjective, FlowSampleConfig

DEFAULT_CONFIG = "glow_cifar10.yaml"


@dataclass(frozen=True)
class Config(TrainerConfig):
    """Train a normalizing flow (RealNVP or Glow)."""

    model: FlowNetConfig = field(default_factory=FlowNetConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    sample: FlowSampleConfig = field(default_factory=FlowSampleConfig, metadata=MAY_CHANGE)
    eval: EvalConfig = field(
        default_factory=lambda: EvalConfig(metric="bits_per_dim"), metadata=MAY_CHANGE
    )


def make_parts(config: Config, image_shape: tuple[int, int, int], num_classes: int) -> Parts:
    """Build the flow, its weights drawn from the run's seed, and its objective."""
    dtype = config.train.dtype
    objective = FlowObjective(config.flow, config.sample, image_shape, dtype)
    torch.manual_seed(config.run.seed)  # only the initial weights use torch's generator
    net = Flow(config.model, image_shape)
    return Parts({"flow": net.to(dtype)}, objective)


main = functools.partial(run_training, Config, DEFAULT_CONFIG, make_parts)
"""Train by the configuration of the command line."""
