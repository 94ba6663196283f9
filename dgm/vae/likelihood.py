"""The decoder's likelihoods: -log p(x | z) of stored pixels, nats.

Both are for images in [-1, 1], in nats of the stored grey levels, so their bounds are comparable.
Shapes: images uint8 [B, H, W, C], all else [B, C, H, W].
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from dgm.preprocessing import DEQUANTIZED, STANDARD
from dgm.rng import Draws

LikelihoodName = Literal["discretized_logistic", "gaussian"]


class PixelDistribution(NamedTuple):
    """Mean and log scale of each pixel."""

    mean: Tensor
    log_scale: Tensor


def reconstruction_nll(
    name: LikelihoodName, images: Tensor, pixels: PixelDistribution, draws: Draws
) -> Tensor:
    """Return -log p of each image, nats [B]; `draws` are for the Gaussian's dequantization."""
    if name == "discretized_logistic":
        nll = discretized_logistic_nll(images, pixels)
    else:
        nll = gaussian_nll(DEQUANTIZED.dequantize(images, draws, pixels.mean.dtype), pixels)
    return nll.flatten(1).sum(1)


def discretized_logistic_nll(images: Tensor, pixels: PixelDistribution) -> Tensor:
    """Return -log of a logistic's mass in each stored grey level, nats (Kingma et al. 2016).

    The mass of level x is `S((x + h - mean) / s) - S((x - h - mean) / s)`, where S is the sigmoid,
    s the scale and h half a level; the first and last level reach to infinity (Salimans et al.
    2017, section 2.1).
    """
    x, levels = STANDARD.scale(images, pixels.mean.dtype), images.permute(0, 3, 1, 2)
    width = STANDARD.bin_width
    inverse = torch.exp(-pixels.log_scale)
    upper = (x - pixels.mean + width / 2) * inverse
    lower = (x - pixels.mean - width / 2) * inverse
    # S(a) - S(b) = S(a) S(-b) (1 - exp(b - a)): in logarithms nothing cancels in the tails, and no
    # mass has to be clamped.
    zero = torch.zeros((), dtype=x.dtype, device=x.device)
    below = torch.where(levels == 255, zero, functional.logsigmoid(upper))
    above = torch.where(levels == 0, zero, functional.logsigmoid(-lower))
    within = torch.log(-torch.expm1(-width * inverse))
    inner = (levels > 0) & (levels < 255)
    return -(below + above + torch.where(inner, within, zero))


def gaussian_nll(x: Tensor, pixels: PixelDistribution) -> Tensor:
    """Return an upper bound on -log of a Gaussian's mass in each grey level, nats.

    x are dequantized images (preprocessing.DEQUANTIZED). The negative log-density minus
    log(bin_width) is at least -log P of the stored image, on average over the dequantization noise
    (Theis et al. 2016, section 3.1).
    """
    error, width = (x - pixels.mean) * torch.exp(-pixels.log_scale), math.log(DEQUANTIZED.bin_width)
    return 0.5 * error.square() + pixels.log_scale + (0.5 * math.log(2 * math.pi) - width)


def sample_pixels(name: LikelihoodName, pixels: PixelDistribution, draws: Draws) -> Tensor:
    """Return images [B, C, H, W] in [-1, 1] drawn from p(x | z), rounded to grey levels."""
    mean, scale = pixels.mean, torch.exp(pixels.log_scale)
    _, channels, height, width = mean.shape
    shape = height, width, channels
    if name == "discretized_logistic":
        uniform = draws.uniform("pixels", shape, mean.dtype) + 2.0**-25  # neither 0 nor 1
        noise, pixel_map = torch.logit(uniform.clamp(max=1 - 2.0**-24)), STANDARD
    else:
        noise, pixel_map = draws.normal("pixels", shape, mean.dtype), DEQUANTIZED
    x = mean + scale * noise.permute(0, 3, 1, 2)
    return pixel_map.from_levels((pixel_map.to_levels(x) + 0.5).floor())
