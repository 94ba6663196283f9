"""Turn stored images into noised ones: choose timesteps, flip, scale, draw noise, q_sample.

Two compiled passes, and the flip between them as it is: its mirrored reads of three bytes at a time
would keep compiled code from being vectorised.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dgm.pixels import draw_mirrored
from dgm.rng import Draws


class Chosen(NamedTuple):
    """What is drawn once per image."""

    mirrored: Tensor  # bool [B]
    t: Tensor  # int64 [B]
    alpha: Tensor  # [B, 1, 1, 1]
    sigma: Tensor  # [B, 1, 1, 1]
    told: Tensor  # int64 [B]: the label, or `nobody` where it is dropped


class Noised(NamedTuple):
    """Images of a batch before and after noising, each [B, C, H, W] channels_last in [-1, 1]."""

    x_t: Tensor
    x_0: Tensor
    eps: Tensor


def choose(
    labels: Tensor, alphas: Tensor, sigmas: Tensor, draws: Draws, label_drop: float, nobody: int
) -> Chosen:
    """Draw timestep, mirroring (probability 1/2) and label drop of each image.

    labels: int64 [B]; alphas, sigmas: [T]; `nobody` is the label of a dropped one.
    """
    t = draws.integers("timestep", len(alphas))
    dropped = draws.uniform("label_drop", (1,))[:, 0] < label_drop
    alpha, sigma = (levels[t][:, None, None, None] for levels in (alphas, sigmas))
    return Chosen(draw_mirrored(draws), t, alpha, sigma, torch.where(dropped, nobody, labels))


def q_sample(
    images: Tensor, alpha: Tensor, sigma: Tensor, draws: Draws, dequantize: bool = False
) -> Noised:
    """Draw `x_t = alpha x_0 + sigma eps` (Ho et al. 2020, equation 4) from stored images.

    images: uint8 [B, H, W, C]; alpha, sigma: [B, 1, 1, 1], whose dtype is the result's. With
    `dequantize`, uniform noise of one grey level is added to the pixels first.
    """
    shape, dtype = tuple(images.shape[1:]), alpha.dtype
    x_0 = images.to(dtype)
    if dequantize:
        x_0 = (x_0 + draws.uniform("dequantize", shape, dtype)) * (1 / 128) - 1
    else:
        x_0 = x_0 * (1 / 127.5) - 1
    eps = draws.normal("noise", shape, dtype)
    x_t = alpha * x_0 + sigma * eps
    # Memory stays [B, H, W, C]; the permuted view is what torch calls channels_last.
    return Noised(*(part.permute(0, 3, 1, 2) for part in (x_t, x_0, eps)))


class Noising:
    """Choose and noise, compiled where that works."""

    def __init__(self, compiled: bool):
        """Prepare; `compiled` turns to eager with a warning where no compiler is at hand."""
        self.choose: Any = _or_eager(choose) if compiled else choose
        self.q_sample: Any = _or_eager(q_sample) if compiled else q_sample


def _or_eager(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function; where compiling fails, warn once and run it as it is."""
    compiled = torch.compile(function, fullgraph=True, dynamic=False)
    # No compiler, no headers; or more batch sizes than torch compiles for, an exception of its own.
    failures = torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit
    working = True

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        nonlocal working
        if working:
            try:
                return compiled(*args)
            except failures as error:
                working = False
                reason = str(error).strip().splitlines()[0]
                warnings.warn(f"{function.__name__} runs uncompiled: {reason}", stacklevel=2)
        return function(*args)

    return call
