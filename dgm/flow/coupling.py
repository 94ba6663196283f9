"""Affine couplings, and the networks that tell them how to scale and shift.

z = x exp(log_scale) + shift for some of the values, where both come from a network that sees only
the others (Dinh et al. 2017, section 3.2). `log_scale` is held within 2 either way by a tanh,
so that neither direction can explode in one layer; the networks' last convolutions begin at zero,
so that a coupling begins as the identity.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from dgm.flow.bijections import standardizing
from dgm.nn.layers import group_norm, zeroed

_MAX_LOG_SCALE = 2.0


class NormedConv(nn.Conv2d):
    """Convolution followed by actnorm, which is folded into its weights and so costs no pass."""

    def __init__(self, inputs: int, outputs: int, size: int):
        """Map `inputs` channels to `outputs` with a kernel of an odd side `size`."""
        super().__init__(inputs, outputs, size, padding=size // 2)
        assert self.bias is not None, "it is actnorm's"
        nn.init.zeros_(self.bias)
        self.log_scale = nn.Parameter(torch.zeros(outputs))

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Let the output for x have mean 0 and variance 1 in each channel."""
        assert self.bias is not None, "it is actnorm's"
        raw = functional.conv2d(x, self.weight, padding=self.padding)
        log_scale, bias = standardizing(raw)
        self.log_scale.copy_(log_scale)
        self.bias.copy_(bias)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve, scale and shift."""
        weight = self.weight * self.log_scale.exp()[:, None, None, None]
        return functional.conv2d(x, weight, self.bias, padding=self.padding)


def conv_net(inputs: int, outputs: int, hidden: int) -> nn.Sequential:
    """Make Glow's network: 3x3, 1x1 and 3x3 convolutions, the first two with actnorm."""
    return nn.Sequential(
        NormedConv(inputs, hidden, 3),
        nn.ReLU(inplace=True),
        NormedConv(hidden, hidden, 1),
        nn.ReLU(inplace=True),
        zeroed(nn.Conv2d(hidden, outputs, 3, padding=1)),
    )


class ResidualBlock(nn.Module):
    """GroupNorm, ReLU, convolution, twice, added to the input."""

    def __init__(self, width: int):
        """Keep `width` channels."""
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
        """Give x plus what the block adds to it, [B, width, H, W]."""
        return x + self.body(x)


def residual_net(inputs: int, outputs: int, hidden: int, blocks: int) -> nn.Sequential:
    """Make RealNVP's network of residual blocks, with GroupNorm in place of batch norm."""
    return nn.Sequential(
        nn.Conv2d(inputs, hidden, 3, padding=1),
        *(ResidualBlock(hidden) for _ in range(blocks)),
        group_norm(hidden),
        nn.ReLU(inplace=True),
        zeroed(nn.Conv2d(hidden, outputs, 3, padding=1)),
    )


class Coupling(nn.Module):
    """Transform half of the channels as a network says that sees the other half.

    With `swap` the first half is transformed, else the second. The network gives as many channels
    as are transformed (shifts: an additive coupling) or twice as many (and scales).
    """

    recomputable = True

    def __init__(self, net: nn.Module, swap: bool = False):
        """Couple by this network."""
        super().__init__()
        self.net, self.swap = net, swap

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Transform."""
        seen, free = self._halves(x)
        shift, log_scale = _read(self.net(seen), free)
        z, log_det = _transform(free, shift, log_scale)
        return self._joined(seen, z), log_det

    def inverse(self, z: Tensor) -> Tensor:
        """Transform back."""
        seen, free = self._halves(z)
        shift, log_scale = _read(self.net(seen), free)
        return self._joined(seen, _transform_back(free, shift, log_scale))

    def _halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first, second = x.chunk(2, dim=1)
        return (second, first) if self.swap else (first, second)

    def _joined(self, seen: Tensor, free: Tensor) -> Tensor:
        return torch.cat([free, seen] if self.swap else [seen, free], dim=1)


class Checkerboard(nn.Module):
    """Transform every other pixel as a network says that sees the rest, with zeros between.

    Dinh et al. 2017, section 3.4. With `odd` the pixels are transformed whose row and column add up
    to an odd number.
    """

    free: Tensor  # [H, W]: 1 where pixels are transformed

    def __init__(self, net: nn.Module, height: int, width: int, odd: bool):
        """Couple images of this size by this network."""
        super().__init__()
        self.net = net
        parity = (torch.arange(height)[:, None] + torch.arange(width)) % 2
        self.register_buffer("free", (parity == int(odd)).float())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Transform."""
        return _transform(x, *self._read(x))

    def inverse(self, z: Tensor) -> Tensor:
        """Transform back."""
        return _transform_back(z, *self._read(z))

    def _read(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        shift, log_scale = _read(self.net(x * (1 - self.free)), x)
        return shift * self.free, None if log_scale is None else log_scale * self.free


def _read(said: Tensor, free: Tensor) -> tuple[Tensor, Tensor | None]:
    """Read the shift and the bounded log_scale, if any, from what a network says."""
    said = said.to(free.dtype)  # autocast leaves it in less
    if said.shape[1] == free.shape[1]:
        return said, None
    shift, raw = said.chunk(2, dim=1)
    return shift, _MAX_LOG_SCALE * torch.tanh(raw * (1 / _MAX_LOG_SCALE))


def _transform(x: Tensor, shift: Tensor, log_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    if log_scale is None:
        return x + shift, x.new_zeros(len(x))
    return torch.addcmul(shift, x, log_scale.exp()), log_scale.sum((1, 2, 3))


def _transform_back(z: Tensor, shift: Tensor, log_scale: Tensor | None) -> Tensor:
    return z - shift if log_scale is None else (z - shift) * (-log_scale).exp()
