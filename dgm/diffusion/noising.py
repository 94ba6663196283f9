"""Turn stored images into noised ones: flip, scale, draw noise, q_sample.

Two passes, because a mirrored read would keep the second one from being vectorised.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dgm.rng import Draws


class Noised(NamedTuple):
    """Images of a batch before and after noising, each [B, C, H, W] channels_last in [-1, 1]."""

    x_t: Tensor
    x_0: Tensor
    eps: Tensor


def flip_images(images: Tensor, draws: Draws) -> Tensor:
    """Mirror each of uint8 [B, H, W, C] with probability 1/2."""
    mirrored = draws.bits("flip", 1)[0][:, 0] >= 2**31
    return torch.where(mirrored[:, None, None, None], images.flip(2), images)


def q_sample(
    images: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    draws: Draws,
    dequantize: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Noised:
    """Draw `x_t = alpha x_0 + sigma eps` (Ho et al. 2020, equation 4) from stored images.

    images: uint8 [B, H, W, C]; alpha, sigma: [B]. With `dequantize`, uniform noise of one grey
    level is added to the pixels first.
    """
    shape = tuple(images.shape[1:])
    x_0 = images.to(dtype)
    if dequantize:
        x_0 = (x_0 + draws.uniform("dequantize", shape, dtype)) * (1 / 128) - 1
    else:
        x_0 = x_0 * (1 / 127.5) - 1
    eps = draws.normal("noise", shape, dtype)
    x_t = alpha.to(dtype)[:, None, None, None] * x_0 + sigma.to(dtype)[:, None, None, None] * eps
    # Memory stays [B, H, W, C]; the permuted view is what torch calls channels_last.
    return Noised(*(part.permute(0, 3, 1, 2) for part in (x_t, x_0, eps)))


class Noising:
    """Flip and noise images, compiled where that works."""

    def __init__(self, compiled: bool = True, flip: bool = True, dequantize: bool = False):
        """Prepare; `compiled` turns to eager with a warning where no compiler is at hand."""
        self.flip: Any = _or_eager(flip_images) if compiled else flip_images
        self.q_sample: Any = _or_eager(q_sample) if compiled else q_sample
        self.flips, self.dequantizes = flip, dequantize

    def __call__(
        self, images: Tensor, alpha: Tensor, sigma: Tensor, draws: Draws, dtype: torch.dtype
    ) -> Noised:
        """Noise uint8 [B, H, W, C] to levels alpha, sigma [B]; see `q_sample`."""
        if self.flips:
            images = self.flip(images, draws)
        return self.q_sample(images, alpha, sigma, draws, self.dequantizes, dtype)


def _or_eager(function: Callable[..., object]) -> Callable[..., object]:
    """Compile a function; where compiling fails, warn once and run it as it is."""
    compiled = torch.compile(function, fullgraph=True, dynamic=False)
    working = True

    @functools.wraps(function)
    def call(*args: object) -> object:
        nonlocal working
        if working:
            try:
                return compiled(*args)
            except torch._dynamo.exc.TorchDynamoException as error:  # no compiler, no headers
                working = False
                reason = str(error).strip().splitlines()[0]
                warnings.warn(f"{function.__name__} runs uncompiled: {reason}", stacklevel=2)
        return function(*args)

    return call
