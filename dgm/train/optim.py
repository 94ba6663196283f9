"""Optimizer and learning rate; the rate is a pure function of images seen."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch

from dgm.errors import UserError


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its learning rate; the defaults are DDPM's for CIFAR-10."""

    lr: float = 2e-4
    """Learning rate after the warm-up."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the running means of the gradient and of its square."""
    eps: float = 1e-8
    """Term that keeps the division from zero."""
    weight_decay: float = 0.0
    """Decoupled weight decay; 0 makes it Adam."""
    warmup_images: int = 640_000
    """Images over which the rate rises linearly from zero."""
    decay: Literal["constant", "cosine"] = "constant"
    """Course of the rate after the warm-up: `cosine` falls to zero at train.total_images."""
    clip_norm: float = 1.0
    """Largest norm of the gradient; 0 does not clip."""


def make_optimizer(
    parameters: Iterable[torch.nn.Parameter], config: OptimConfig
) -> torch.optim.Optimizer:
    """Make AdamW, its update fused into one pass over the weights."""
    if config.lr <= 0:
        raise UserError(f"optim.lr is {config.lr}: choose a number above 0")
    for name in ("eps", "weight_decay", "warmup_images", "clip_norm"):
        if getattr(config, name) < 0:
            raise UserError(f"optim.{name} is {getattr(config, name)}: choose 0 or more")
    if not all(0 <= beta < 1 for beta in config.betas):
        raise UserError(f"optim.betas is {list(config.betas)}: choose numbers from 0 to below 1")
    return torch.optim.AdamW(
        parameters,
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


def learning_rate(config: OptimConfig, images_seen: int, total_images: int) -> float:
    """Give the rate of the step that ends at `images_seen`."""
    rate = config.lr
    if config.warmup_images > 0:
        rate *= min(1.0, images_seen / config.warmup_images)
    if config.decay == "cosine":
        start = min(config.warmup_images, total_images)
        done = (images_seen - start) / max(total_images - start, 1)
        rate *= 0.5 * (1 + math.cos(math.pi * min(max(done, 0.0), 1.0)))
    return rate
