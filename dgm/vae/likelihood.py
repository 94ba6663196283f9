"""How probable stored pixels are, given what the decoder says: -log p(x | z), nats.

Both likelihoods speak of images in [-1, 1] and give nats of the stored grey levels, so that their
bounds compare. Shapes: images uint8 [B, H, W, C], all else [B, C, H, W].
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


class Pixels(NamedTuple):
    """A distribution of each pixel: its mean and the logarithm of its scale."""

    mean: Tensor
    log_scale: Tensor


def reconstruction_nll(
    name: LikelihoodName, images: Tensor, pixels: Pixels, draws: Draws
) -> Tensor:
    """Compute -log p of each image, nats [B]; `draws` dequantise for the Gaussian."""
    if name == "discretized_logistic":
        nll = discretized_logistic_nll(images, pixels)
    else:
        nll = gaussian_nll(DEQUANTIZED.dequantize(images, draws, pixels.mean.dtype), pixels)
    return nll.flatten(1).sum(1)


def discretized_logistic_nll(images: Tensor, pixels: Pixels) -> Tensor:
    """Compute -log of a logistic's mass in each stored grey level, nats (Kingma et al. 2016).

    The mass of level x is `S((x + h - mean) / s) - S((x - h - mean) / s)`, where S is the sigmoid,
    s the scale and h half a level; the first and last level reach to infinity (Salimans et al.
    2017, section 2.1).
    """
    x, levels = STANDARD.scale(images, pixels.mean.dtype), images.permute(0, 3, 1, 2)
    width = STANDARD.bin_width
    inverse = torch.exp(-pixels.log_scale)
    upper = (x - pixels.mean + width / 2) * inverse
    lower = (x - pixels.mean - width / 2) * inverse
    # S(a) - S(b) = S(a) S(-b) (1 - exp(b - a)): in logarithms nothing cancels, however far the
    # tail, and no mass has to be held above a least one.
    nothing = torch.zeros((), dtype=x.dtype, device=x.device)
    below = torch.where(levels == 255, nothing, functional.logsigmoid(upper))
    above = torch.where(levels == 0, nothing, functional.logsigmoid(-lower))
    within = torch.log(-torch.expm1(-width * inverse))
    inner = (levels > 0) & (levels < 255)
    return -(below + above + torch.where(inner, within, nothing))


def gaussian_nll(x: Tensor, pixels: Pixels) -> Tensor:
    """Bound -log of a Gaussian's mass in each grey level by its density, nats.

    x holds dequantised images (pixels.DEQUANTIZED). Subtracting log(bin_width) from the negative
    log-density gives a bound for the stored image: on average over the dequantisation noise the
    sum is at least -log P (Theis et al. 2016, section 3.1).
    """
    error, width = (x - pixels.mean) * torch.exp(-pixels.log_scale), math.log(DEQUANTIZED.bin_width)
    return 0.5 * error.square() + pixels.log_scale + (0.5 * math.log(2 * math.pi) - width)


def draw_pixels(name: LikelihoodName, pixels: Pixels, draws: Draws) -> Tensor:
    """Draw grey levels from p(x | z), images of the objective's pixel map."""
    mean, spread = pixels.mean, torch.exp(pixels.log_scale)
    _, channels, height, width = mean.shape
    shape = height, width, channels
    if name == "discretized_logistic":
        share = draws.uniform("pixels", shape, mean.dtype) + 2.0**-25  # neither 0 nor 1
        x = mean + spread * torch.logit(share.clamp(max=1 - 2.0**-24)).permute(0, 3, 1, 2)
        of = STANDARD
    else:
        x = mean + spread * draws.normal("pixels", shape, mean.dtype).permute(0, 3, 1, 2)
        of = DEQUANTIZED
    return of.from_levels((of.to_levels(x) + 0.5).floor())
