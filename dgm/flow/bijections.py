"""Invertible layers: `forward(x) -> z, log_det` and `inverse(z) -> x`.

x and z are [B, C, H, W], channels_last in memory; log_det is log |det dz/dx| of each image, [B], in
the precision of x, float32 or float64: autocast applies to the networks inside couplings only.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional


class Chain(nn.Sequential):
    """A sequence of layers; log_det is the sum of theirs."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map from the first layer to the last."""
        log_det = x.new_zeros(len(x))
        for layer in self:
            x, layer_log_det = layer(x)
            log_det = log_det + layer_log_det
        return x, log_det

    def inverse(self, z: Tensor) -> Tensor:
        """Map back from the last layer to the first."""
        for layer in reversed(list(self)):
            z = cast(Any, layer).inverse(z)
        return z


class Squeeze(nn.Module):
    """Fold squares of 2 x 2 pixels into channels: [B, C, H, W] to [B, 4 C, H/2, W/2].

    The first half of the channels are the upper pixels, so that masks of channel halves differ from
    checkerboard masks (Dinh et al. 2017, section 3.6).
    """

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Fold; log_det is 0."""
        batch, channels, height, width = x.shape
        squares = x.permute(0, 2, 3, 1).reshape(batch, height // 2, 2, width // 2, 2, channels)
        z = squares.permute(0, 1, 3, 2, 4, 5).reshape(batch, height // 2, width // 2, 4 * channels)
        return z.permute(0, 3, 1, 2), x.new_zeros(batch)

    def inverse(self, z: Tensor) -> Tensor:
        """Unfold."""
        batch, channels, height, width = z.shape
        squares = z.permute(0, 2, 3, 1).reshape(batch, height, width, 2, 2, channels // 4)
        x = squares.permute(0, 1, 3, 2, 4, 5).reshape(batch, 2 * height, 2 * width, channels // 4)
        return x.permute(0, 3, 1, 2)


class Logit(nn.Module):
    """Map pixels from [-1, 1] to z = logit(alpha + (1 - 2 alpha) u), u = (x + 1) / 2.

    Dinh et al. 2017, section 4.1, except that they keep a distance only from 0, not from 1.
    """

    def __init__(self, alpha: float):
        """Keep a distance `alpha`, in (0, 1/2), from 0 and 1."""
        super().__init__()
        self.alpha = alpha

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map to the real line."""
        slope = 0.5 - self.alpha
        z = torch.logit(x * slope + 0.5)
        # dz/dx = slope / (v (1 - v)) where v = sigmoid(z).
        log_slope = functional.softplus(z) + functional.softplus(-z) + math.log(slope)
        return z, log_slope.sum((1, 2, 3))

    def inverse(self, z: Tensor) -> Tensor:
        """Map back; extreme z map to values outside [-1, 1]."""
        return (torch.sigmoid(z) - 0.5) * (1 / (0.5 - self.alpha))


def actnorm_parameters(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return log_scale and bias, [C], that standardize each channel of x."""
    variance, mean = torch.var_mean(x.double(), dim=(0, 2, 3), correction=0)
    scale = 1 / variance.sqrt().clamp(min=1e-6)
    return scale.log(), -mean * scale


class ActNorm(nn.Module):
    """Scale and shift each channel: z = x exp(log_scale) + bias.

    Kingma and Dhariwal 2018, section 3.1. It starts as the identity; `initialize` standardizes its
    output on a batch.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Set mean 0 and variance 1 of the output for x in each channel."""
        for parameter, value in zip(self.parameters(), actnorm_parameters(x), strict=True):
            parameter.copy_(value)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift."""
        z = torch.addcmul(self.bias[:, None, None], x, self.log_scale.exp()[:, None, None])
        return z, (x.shape[2] * x.shape[3] * self.log_scale.sum()).expand(len(x))

    def inverse(self, z: Tensor) -> Tensor:
        """Shift and scale back."""
        return (z - self.bias[:, None, None]) * (-self.log_scale).exp()[:, None, None]


class InvertibleConv(nn.Module):
    """Mix the channels of each pixel by W = P L U (Kingma and Dhariwal 2018, section 3.2).

    P is a fixed permutation; the diagonal of L is 1, that of U is s, whose signs are fixed. So W
    stays invertible, also as a moving average, and log_det = H W sum(log |s|). W is initialized as
    a random rotation.
    """

    permutation: Tensor  # [C, C]
    sign_s: Tensor  # [C]

    def __init__(self, channels: int):
        super().__init__()
        rotation, _ = torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64))
        permutation, lower, upper = (m.float() for m in torch.linalg.lu(rotation))
        s = upper.diagonal()
        self.register_buffer("permutation", permutation)
        self.register_buffer("sign_s", s.sign())
        self.lower = nn.Parameter(lower.tril(-1))
        self.upper = nn.Parameter(upper.triu(1))
        self.log_s = nn.Parameter(s.abs().log())

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return L and U, each [C, C]."""
        ones = torch.ones_like(self.log_s)
        lower = self.lower.tril(-1) + torch.diag(ones)
        return lower, self.upper.triu(1) + torch.diag(self.sign_s * self.log_s.exp())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mix channels."""
        with torch.autocast(x.device.type, enabled=False):
            lower, upper = self.factors()
            weight = self.permutation @ (lower @ upper)
            # A matrix product, not a convolution, which a GPU would compute in TF32.
            z = functional.linear(x.permute(0, 2, 3, 1), weight).permute(0, 3, 1, 2)
        return z, (x.shape[2] * x.shape[3] * self.log_s.sum()).expand(len(x))

    def inverse(self, z: Tensor) -> Tensor:
        """Invert by U^-1 L^-1 P', from two triangular solves."""
        with torch.autocast(z.device.type, enabled=False):
            # The factors are small, so double precision is cheap.
            lower, upper = (factor.double() for factor in self.factors())
            unmixed = torch.linalg.solve_triangular(
                lower, self.permutation.mT.double(), upper=False, unitriangular=True
            )
            weight = torch.linalg.solve_triangular(upper, unmixed, upper=True).to(z.dtype)
            return functional.linear(z.permute(0, 2, 3, 1), weight).permute(0, 3, 1, 2)
