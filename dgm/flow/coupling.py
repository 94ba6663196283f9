"""Affine couplings, and the networks that predict their scale and shift.

z = x exp(log_scale) + shift for part of the values, where both come from a network of the others
(Dinh et al. 2017, section 3.2). A tanh bounds `log_scale` to [-2, 2], so that neither direction can
explode in one layer; the networks' last convolutions are zero at initialization, so that a coupling
starts as the identity.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from dgm.flow.bijections import actnorm_parameters
from dgm.nn.layers import group_norm, zeroed

_MAX_LOG_SCALE = 2.0


class NormedConv(nn.Conv2d):
    """Convolution with actnorm folded into its weights, which saves a pass."""

    def __init__(self, inputs: int, outputs: int, size: int):
        """Map `inputs` channels to `outputs` with a kernel of an odd side `size`."""
        super().__init__(inputs, outputs, size, padding=size // 2)
        assert self.bias is not None, "it is the bias of actnorm"
        nn.init.zeros_(self.bias)
        self.log_scale = nn.Parameter(torch.zeros(outputs))

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Set mean 0 and variance 1 of the output for x in each channel."""
        assert self.bias is not None, "it is the bias of actnorm"
        raw = functional.conv2d(x, self.weight, padding=self.padding)
        log_scale, bias = actnorm_parameters(raw)
        self.log_scale.copy_(log_scale)
        self.bias.copy_(bias)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve, scale and shift."""
        weight = self.weight * self.log_scale.exp()[:, None, None, None]
        return functional.conv2d(x, weight, self.bias, padding=self.padding)


def conv_net(inputs: int, outputs: int, hidden: int) -> nn.Sequential:
    """Return Glow's network: 3x3, 1x1 and 3x3 convolutions, the first two with actnorm."""
    return nn.Sequential(
        NormedConv(inputs, hidden, 3),
        nn.ReLU(inplace=True),
        NormedConv(hidden, hidden, 1),
        nn.ReLU(inplace=True),
        zeroed(nn.Conv2d(hidden, outputs, 3, padding=1)),
    )


class CouplingBlock(nn.Module):
    """GroupNorm, ReLU, convolution, twice, added to the input."""

    def __init__(self, width: int):
        super().__init__()
        self.body = nn.Sequential(
            group_norm(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, padding=1),
            group_norm(width),
            nn.ReLU(inplace=True),
            zeroed(nn.Conv2d(width, width, 3, padding=1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, width, H, W] to the same."""
        return x + self.body(x)


def residual_net(inputs: int, outputs: int, hidden: int, blocks: int) -> nn.Sequential:
    """Return RealNVP's network of residual blocks, with GroupNorm in place of batch norm."""
    return nn.Sequential(
        nn.Conv2d(inputs, hidden, 3, padding=1),
        *(CouplingBlock(hidden) for _ in range(blocks)),
        group_norm(hidden),
        nn.ReLU(inplace=True),
        zeroed(nn.Conv2d(hidden, outputs, 3, padding=1)),
    )


class Coupling(nn.Module):
    """Transform half of the channels, conditioned on the other half.

    With `swap` the first half is transformed, else the second. The network outputs shifts (an
    additive coupling) or shifts and scales.
    """

    recomputable = True

    def __init__(self, net: nn.Module, swap: bool = False):
        super().__init__()
        self.net, self.swap = net, swap

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Transform."""
        identity, transformed = self._split(x)
        z, log_det = _transform(transformed, *_shift_and_log_scale(self.net(identity), transformed))
        return self._join(identity, z), log_det

    def inverse(self, z: Tensor) -> Tensor:
        """Transform back."""
        identity, transformed = self._split(z)
        x = _transform_back(transformed, *_shift_and_log_scale(self.net(identity), transformed))
        return self._join(identity, x)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first, second = x.chunk(2, dim=1)
        return (second, first) if self.swap else (first, second)

    def _join(self, identity: Tensor, transformed: Tensor) -> Tensor:
        return torch.cat([transformed, identity] if self.swap else [identity, transformed], dim=1)


class Checkerboard(nn.Module):
    """Transform every other pixel; its network sees the rest, and 0 at the transformed pixels.

    Dinh et al. 2017, section 3.4. With `odd`, pixels with an odd sum of row and column are
    transformed.
    """

    free: Tensor  # [H, W]: 1 where pixels are transformed

    def __init__(self, net: nn.Module, height: int, width: int, odd: bool):
        super().__init__()
        self.net = net
        parity = (torch.arange(height)[:, None] + torch.arange(width)) % 2
        self.register_buffer("free", (parity == int(odd)).float())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Transform."""
        return _transform(x, *self._shift_and_log_scale(x))

    def inverse(self, z: Tensor) -> Tensor:
        """Transform back."""
        return _transform_back(z, *self._shift_and_log_scale(z))

    def _shift_and_log_scale(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        shift, log_scale = _shift_and_log_scale(self.net(x * (1 - self.free)), x)
        return shift * self.free, None if log_scale is None else log_scale * self.free


def _shift_and_log_scale(out: Tensor, transformed: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return shift and bounded log_scale (None if additive) from a network's output."""
    out = out.to(transformed.dtype)  # autocast lowered its precision
    if out.shape[1] == transformed.shape[1]:
        return out, None
    shift, raw = out.chunk(2, dim=1)
    return shift, _MAX_LOG_SCALE * torch.tanh(raw * (1 / _MAX_LOG_SCALE))


def _transform(x: Tensor, shift: Tensor, log_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    if log_scale is None:
        return x + shift, x.new_zeros(len(x))
    return torch.addcmul(shift, x, log_scale.exp()), log_scale.sum((1, 2, 3))


def _transform_back(z: Tensor, shift: Tensor, log_scale: Tensor | None) -> Tensor:
    return z - shift if log_scale is None else (z - shift) * (-log_scale).exp()
