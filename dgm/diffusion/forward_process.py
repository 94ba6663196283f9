"""Turn stored images into noised ones: choose timesteps, flip, scale, draw noise, q_sample.

On a CPU two compiled passes, and the flip between them as it is: its mirrored reads of three bytes
at a time would keep compiled code from being vectorised. On a GPU one kernel of our own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dgm.diffusion.parameterization import PredictionKind, target
from dgm.nn.compiling import compiled
from dgm.nn.kernels import precompile
from dgm.nn.kernels.choice import has_triton, triton_takes
from dgm.preprocessing import DEQUANTIZED, STANDARD, draw_mirrored, flip_images
from dgm.rng import Draws, int32, purpose_id


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
    levels = images.to(dtype)
    if dequantize:
        x_0 = DEQUANTIZED.dequantize_with(levels, draws.uniform("dequantize", shape, dtype))
    else:
        x_0 = STANDARD.from_levels(levels)
    eps = draws.normal("noise", shape, dtype)
    x_t = alpha * x_0 + sigma * eps
    # Memory stays [B, H, W, C]; the permuted view is what torch calls channels_last.
    return Noised(*(part.permute(0, 3, 1, 2) for part in (x_t, x_0, eps)))


class Example(NamedTuple):
    """What the net is shown, and what it should answer; images [B, C, H, W] channels_last."""

    x_t: Tensor
    wanted: Tensor  # as `diffusion.prediction` says
    t: Tensor  # int64 [B]
    told: Tensor  # int64 [B]: the label, or `nobody`
    alpha: Tensor  # [B, 1, 1, 1]
    sigma: Tensor  # [B, 1, 1, 1]
    x_0: Tensor | None = None  # where asked for


@dataclass(frozen=True)
class Noising:
    """Make examples of stored images.

    way: `eager` is the reference; `compiled` is two compiled passes, which turn to eager with a
    warning where no compiler is at hand; `kernel` is one pass in Triton for images on a GPU, else
    as `compiled`.
    """

    prediction: PredictionKind
    label_drop: float
    nobody: int  # label of an image whose class is withheld
    flip: bool
    dequantize: bool
    way: Literal["eager", "compiled", "kernel"] = "eager"
    keep_x_0: bool = False

    def __call__(
        self, images: Tensor, labels: Tensor, alphas: Tensor, sigmas: Tensor, draws: Draws,
        dtype: torch.dtype | None = None,
    ) -> Example:  # fmt: skip
        """Noise uint8 [B, H, W, C] to levels of alphas and sigmas [T]; `dtype` is that of x_t."""
        if self.way == "kernel" and triton_takes(images.device) and has_triton():
            return self._in_one_kernel(images, labels, alphas, sigmas, draws, dtype)
        eager = self.way == "eager"
        draw, finish = (choose, _noised) if eager else (_compiled(choose), _compiled(_noised))
        mirrored, t, alpha, sigma, told = draw(
            labels, alphas, sigmas, draws, self.label_drop, self.nobody
        )
        images = flip_images(images, mirrored) if self.flip else images
        x_t, wanted, x_0 = finish(
            images, alpha, sigma, draws, self.dequantize, self.prediction, self.keep_x_0
        )
        return Example(x_t, wanted, t, told, alpha, sigma, x_0)

    def _in_one_kernel(
        self, images: Tensor, labels: Tensor, alphas: Tensor, sigmas: Tensor, draws: Draws,
        dtype: torch.dtype | None,
    ) -> Example:  # fmt: skip
        from dgm.nn.kernels.noise_triton import noise

        batch, height, width, channels = images.shape
        count = height * width * channels

        def new(kind: torch.dtype) -> Tensor:
            return torch.empty_like(images, dtype=kind, memory_format=torch.contiguous_format)

        x_t, wanted = new(dtype or alphas.dtype), new(alphas.dtype)
        x_0 = new(alphas.dtype) if self.keep_x_0 else None
        t, told = torch.empty_like(labels), torch.empty_like(labels)
        blocks, held = -(-count // 4), 256
        purposes = ("flip", "timestep", "label_drop", "dequantize", "noise")
        precompile.launch(
            noise, (batch, -(-blocks // held)),
            images.contiguous(), labels.contiguous(), alphas, sigmas, draws.key,
            draws.index.contiguous(), draws.step.contiguous(),
            x_t, wanted, x_0, t, told,
            len(alphas), self.label_drop, self.nobody, width, count, blocks,
            *(int32(purpose_id(purpose)) for purpose in purposes),
            CHANNELS=channels, BLOCK=held, STEP_EACH=draws.step.ndim > 0, FLIP=self.flip,
            DEQUANTIZE=self.dequantize, PREDICTION=self.prediction, KEEP_X_0=self.keep_x_0,
            BIN_WIDTH=(DEQUANTIZED if self.dequantize else STANDARD).bin_width,
            num_warps=2,
        )  # fmt: skip
        if precompile.collecting():  # nothing was written
            plain = replace(self, way="eager")(images, labels, alphas, sigmas, draws)
            return plain._replace(x_t=plain.x_t.to(x_t.dtype))
        seen = [None if part is None else part.permute(0, 3, 1, 2) for part in (x_t, wanted, x_0)]
        alpha, sigma = (levels[t][:, None, None, None] for levels in (alphas, sigmas))
        assert seen[0] is not None and seen[1] is not None, "the kernel wrote them"
        return Example(seen[0], seen[1], t, told, alpha, sigma, seen[2])


def _noised(
    images: Tensor, alpha: Tensor, sigma: Tensor, draws: Draws, dequantize: bool,
    prediction: PredictionKind, keep_x_0: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Noise and say what is to be predicted in one pass, so that only what is used is stored."""
    x_t, x_0, eps = q_sample(images, alpha, sigma, draws, dequantize)
    return x_t, target(prediction, x_0, eps, alpha, sigma), x_0 if keep_x_0 else None


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return compiled(function)
