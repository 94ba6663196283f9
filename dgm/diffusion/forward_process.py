"""The forward process q(x_t | x_0): stored images to the network's inputs and targets.

On a CPU it runs as two compiled passes with an eager flip between them: the flip's mirrored reads
of three bytes at a time would keep compiled code from being vectorized. On a GPU it is one Triton
kernel, which repeats these formulas (`dgm.nn.kernels.noise_triton`).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dgm.diffusion.parameterization import PredictionKind, q_sample, to_prediction
from dgm.nn.compiling import compiled
from dgm.nn.kernels import precompile
from dgm.nn.kernels.dispatch import has_triton, triton_runs_on
from dgm.preprocessing import DEQUANTIZED, STANDARD, draw_flips, flip_images
from dgm.rng import Draws, int32, purpose_id

Backend = Literal["eager", "compiled", "kernel"]
_compiled = functools.cache(compiled)


class PerImageDraws(NamedTuple):
    """What is drawn once per image."""

    flipped: Tensor  # bool [B]
    t: Tensor  # int64 [B]
    alpha: Tensor  # [B, 1, 1, 1]
    sigma: Tensor  # [B, 1, 1, 1]
    labels: Tensor  # int64 [B]: `null_label` where the label is dropped


class NoisedImages(NamedTuple):
    """A batch's noised images, images in [-1, 1] and noise, each [B, C, H, W] channels_last."""

    x_t: Tensor
    x_0: Tensor
    eps: Tensor


def draw_per_image(
    labels: Tensor, alphas: Tensor, sigmas: Tensor, draws: Draws, label_drop: float, null_label: int
) -> PerImageDraws:
    """Draw timestep, flip (probability 1/2) and label dropout of each image.

    labels: int64 [B]; alphas, sigmas: [T]; a dropped label becomes `null_label`.
    """
    t = draws.integers("timestep", len(alphas))
    dropped = draws.uniform("label_drop", (1,))[:, 0] < label_drop
    alpha, sigma = (values[t][:, None, None, None] for values in (alphas, sigmas))
    return PerImageDraws(
        draw_flips(draws), t, alpha, sigma, torch.where(dropped, null_label, labels)
    )


def draw_noised(
    images: Tensor, alpha: Tensor, sigma: Tensor, draws: Draws, dequantize: bool = False
) -> NoisedImages:
    """Draw eps and compute x_t of stored images.

    images: uint8 [B, H, W, C]; alpha, sigma: [B, 1, 1, 1], whose dtype is the result's. With
    `dequantize`, uniform noise of one grey level is added to the pixels first.
    """
    shape, dtype = tuple(images.shape[1:]), alpha.dtype
    grey_levels = images.to(dtype)
    if dequantize:
        x_0 = DEQUANTIZED.dequantize_with(grey_levels, draws.uniform("dequantize", shape, dtype))
    else:
        x_0 = STANDARD.from_levels(grey_levels)
    eps = draws.normal("noise", shape, dtype)
    x_t = q_sample(x_0, eps, alpha, sigma)
    # Memory stays [B, H, W, C]; the permuted view is what torch calls channels_last.
    return NoisedImages(*(part.permute(0, 3, 1, 2) for part in (x_t, x_0, eps)))


class Example(NamedTuple):
    """Inputs and target of the network; images [B, C, H, W] channels_last."""

    x_t: Tensor
    target: Tensor  # what `diffusion.prediction` names
    t: Tensor  # int64 [B]
    labels: Tensor  # int64 [B], with `null_label` where dropped
    alpha: Tensor  # [B, 1, 1, 1]
    sigma: Tensor  # [B, 1, 1, 1]
    x_0: Tensor | None = None  # None without `keep_x_0`


@dataclass(frozen=True)
class ForwardProcess:
    """Make training examples from stored images.

    backend: `eager` is the reference; `compiled` is two compiled passes, which fall back to eager
    with a warning where there is no compiler; `kernel` is one pass in Triton for images on a GPU,
    elsewhere the same as `compiled`.
    """

    prediction: PredictionKind
    label_drop: float
    null_label: int
    flip: bool
    dequantize: bool
    backend: Backend = "eager"
    keep_x_0: bool = False

    def __call__(
        self, images: Tensor, labels: Tensor, alphas: Tensor, sigmas: Tensor, draws: Draws,
        dtype: torch.dtype | None = None,
    ) -> Example:  # fmt: skip
        """Return net inputs and target for uint8 images [B, H, W, C] and int64 labels [B].

        alphas, sigmas: the schedule's, [T]; `dtype` is that of x_t (default: that of alphas).
        """
        if self.backend == "kernel" and triton_runs_on(images.device) and has_triton():
            return self._in_one_kernel(images, labels, alphas, sigmas, draws, dtype)
        draw, finish = draw_per_image, noised_and_target
        if self.backend != "eager":
            draw, finish = _compiled(draw), _compiled(finish)
        flipped, t, alpha, sigma, labels = draw(
            labels, alphas, sigmas, draws, self.label_drop, self.null_label
        )
        images = flip_images(images, flipped) if self.flip else images
        x_t, target, x_0 = finish(
            images, alpha, sigma, draws, self.dequantize, self.prediction, self.keep_x_0
        )
        return Example(x_t, target, t, labels, alpha, sigma, x_0)

    def _in_one_kernel(
        self, images: Tensor, labels: Tensor, alphas: Tensor, sigmas: Tensor, draws: Draws,
        dtype: torch.dtype | None,
    ) -> Example:  # fmt: skip
        from dgm.nn.kernels.noise_triton import noise

        batch, height, width, channels = images.shape
        count = height * width * channels

        def empty(dtype: torch.dtype) -> Tensor:
            return torch.empty_like(images, dtype=dtype, memory_format=torch.contiguous_format)

        x_t, target = empty(dtype or alphas.dtype), empty(alphas.dtype)
        x_0 = empty(alphas.dtype) if self.keep_x_0 else None
        t, labels_out = torch.empty_like(labels), torch.empty_like(labels)
        blocks, block_size = -(-count // 4), 256
        purposes = ("flip", "timestep", "label_drop", "dequantize", "noise")
        precompile.launch(
            noise, (batch, -(-blocks // block_size)),
            images.contiguous(), labels.contiguous(), alphas, sigmas, draws.key,
            draws.index.contiguous(), draws.step.contiguous(),
            x_t, target, x_0, t, labels_out,
            len(alphas), self.label_drop, self.null_label, width, count, blocks,
            *(int32(purpose_id(purpose)) for purpose in purposes),
            CHANNELS=channels, BLOCK=block_size, STEP_EACH=draws.step.ndim > 0, FLIP=self.flip,
            DEQUANTIZE=self.dequantize, PREDICTION=self.prediction, KEEP_X_0=self.keep_x_0,
            BIN_WIDTH=(DEQUANTIZED if self.dequantize else STANDARD).bin_width,
            num_warps=2,
        )  # fmt: skip
        if precompile.collecting():  # the kernel did not run
            eager = replace(self, backend="eager")(images, labels, alphas, sigmas, draws)
            return eager._replace(x_t=eager.x_t.to(x_t.dtype))
        alpha, sigma = (values[t][:, None, None, None] for values in (alphas, sigmas))
        return Example(
            x_t.permute(0, 3, 1, 2), target.permute(0, 3, 1, 2), t, labels_out, alpha, sigma,
            None if x_0 is None else x_0.permute(0, 3, 1, 2),
        )  # fmt: skip


def noised_and_target(
    images: Tensor, alpha: Tensor, sigma: Tensor, draws: Draws, dequantize: bool,
    prediction: PredictionKind, keep_x_0: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Return x_t, the target and x_0 (where kept) from one pass, which stores nothing else."""
    x_t, x_0, eps = draw_noised(images, alpha, sigma, draws, dequantize)
    return x_t, to_prediction(prediction, x_0, eps, alpha, sigma), x_0 if keep_x_0 else None
