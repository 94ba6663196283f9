"""Blocks that several families use."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from dgm.nn.kernels import winograd
from dgm.nn.kernels.choice import Kernels, kernels_for, under_transform
from dgm.nn.kernels.norm import Dropout, norm_act, reads_apart


class NormAct(nn.GroupNorm):
    """GroupNorm and what follows it in a block: scale and shift, SiLU, dropout."""

    kernels: Kernels | None = None  # of our own; `use_kernels` sets it

    def __init__(self, groups: int, channels: int, silu: bool):
        """Prepare for [B, channels, H, W]."""
        super().__init__(groups, channels, eps=1e-6)
        self.silu = silu

    def forward(
        self,
        x: Tensor,
        added: Tensor | None = None,
        scale_shift: tuple[Tensor, Tensor] | None = None,
        dropout: Dropout | None = None,
        skip: Tensor | None = None,
    ) -> Tensor:
        """Normalise concat(x, skip) + added; added, scale and shift are [B, C]."""
        if dropout is not None and dropout.share == 0:
            dropout = None
        return norm_act(
            x,
            self.weight,
            self.bias,
            self.num_groups,
            self.eps,
            added,
            scale_shift,
            self.silu,
            dropout,
            self.kernels,
            skip,
        )

    def reads_apart(self, x: Tensor) -> bool:
        """Return whether x and `skip` are read as they are, rather than copied into one."""
        return reads_apart(self.kernels, x, self.weight, self.num_groups)


class DeferredBiasConv2d(nn.Conv2d):
    """A convolution that leaves adding its bias to the next layer, which saves a pass."""

    native = False  # by a kernel of our own; `use_kernels` sets it

    def forward(self, x: Tensor, added: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Return the convolution without bias, and `added` [B, C] plus the bias."""
        assert self.bias is not None, "without a bias there is nothing to leave"
        bias = self.bias.expand(x.shape[0], -1) if added is None else added + self.bias
        if self.native:
            return winograd.convolve(self, x, bias=False), bias
        return self._conv_forward(x, self.weight, None), bias


class PointwiseConv2d(nn.Conv2d):
    """A 1x1 convolution as a matrix product over the positions of channels_last images."""

    def __init__(self, inputs: int, outputs: int):
        """Map `inputs` channels to `outputs`."""
        super().__init__(inputs, outputs, 1)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """Map [B, C, H, W]; the channels of `skip` follow those of x, which no copy then joins."""
        weight = self.weight.flatten(1)
        x = x.permute(0, 2, 3, 1)
        if skip is None:
            y = functional.linear(x, weight, self.bias)
        else:
            of_x, of_skip = weight.split([x.shape[-1], skip.shape[1]], dim=1)
            y = functional.linear(x, of_x, self.bias)
            y = y + functional.linear(skip.permute(0, 2, 3, 1), of_skip)
        return y.permute(0, 3, 1, 2)


def group_norm(channels: int, silu: bool = False) -> NormAct:
    """Make a GroupNorm of at most 32 groups with at least 4 channels each, where they divide."""
    groups = next(g for g in range(min(32, max(1, channels // 4)), 0, -1) if channels % g == 0)
    return NormAct(groups, channels, silu)


def use_kernels(net: nn.Module, device: torch.device | None = None) -> None:
    """Use our own kernels in a net on `device`, where there are some for it.

    The default device is that of the net's parameters.
    """
    kernels = kernels_for(next(net.parameters()).device if device is None else device)
    for module in net.modules():
        if isinstance(module, NormAct):
            module.kernels = kernels
        elif isinstance(module, DeferredBiasConv2d):
            module.native = kernels == "native" and winograd.suits(module)
    if kernels == "native":
        winograd.use_in(net)


def recompute_activations(net: nn.Module) -> int:
    """Let each `recomputable` module keep its input only (Chen et al. 2016); say how many do.

    What it computes within is computed again in the backward pass, dropout too: it is no stream.
    """
    found = [module for module in net.modules() if getattr(module, "recomputable", False)]
    for module in found:
        module.forward = functools.partial(_recomputed, module.forward)
    return len(found)


def _recomputed(forward: Callable[..., Tensor], *args: Any, **named: Any) -> Tensor:
    """Checkpoint the activations of `forward`; torch supports this in reverse mode only."""
    if under_transform():
        return forward(*args, **named)
    made: Tensor = checkpoint(
        forward, *args, use_reentrant=False, preserve_rng_state=False, **named
    )
    return made


def upsample(x: Tensor) -> Tensor:
    """Repeat each pixel of [B, C, H, W] twice along both sides: nearest-neighbour upsampling."""
    return repeat_pixels(x) if x.is_cuda else functional.interpolate(x, scale_factor=2)


def repeat_pixels(x: Tensor) -> Tensor:
    """Do what `upsample` does by broadcasting, so that the gradient is a plain sum of four pixels.

    Compiled for a GPU, the backward pass of `interpolate` adds into fp32 NCHW memory by atomics: in
    no fixed order, and in a layout that each convolution before it then has to copy.
    """
    batch, channels, height, width = x.shape
    pixels = x.permute(0, 2, 3, 1)[:, :, None, :, None, :]
    twice = pixels.expand(batch, height, 2, width, 2, channels)
    return twice.reshape(batch, 2 * height, 2 * width, channels).permute(0, 3, 1, 2)


class Upsample(nn.Module):
    """`upsample` as a layer."""

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, H, W] to [B, C, 2 H, 2 W]."""
        return upsample(x)


def timestep_embedding(t: Tensor, channels: int, max_period: float = 10_000.0) -> Tensor:
    """Embed t [B] in sines and cosines, float32 [B, channels] (Vaswani et al. 2017, 3.5)."""
    half = channels // 2
    exponent = torch.arange(half, dtype=torch.float32, device=t.device) / max(half - 1, 1)
    angles = t.to(torch.float32)[:, None] * torch.exp(-math.log(max_period) * exponent)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def join(h: Tensor, skip: Tensor) -> Tensor:
    """Put the channels of two images [B, C, H, W] behind each other.

    As `torch.cat`, but for the gradient of h, which is given in channels_last: a mere view of some
    channels would be copied by each convolution that it goes back to.
    """
    if under_transform():
        return torch.cat([h, skip], dim=1)
    joined: Tensor = _Join.apply(h, skip)
    return joined


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(h: Tensor, skip: Tensor) -> Tensor:
        return torch.cat([h, skip], dim=1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.channels = inputs[0].shape[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        of_h = grad[:, : ctx.channels].contiguous(memory_format=torch.channels_last)
        return of_h, grad[:, ctx.channels :]


Conv = TypeVar("Conv", bound=nn.Conv2d)


def zeroed(layer: Conv) -> Conv:
    """Let a convolution output zero at first, so that its block begins as the identity.

    All other layers keep torch's initialisation: it makes weights smaller than DDPM's variance
    scaling, so that steps of Adam change them faster, and small nets learn in a fraction of the
    steps.
    """
    nn.init.zeros_(layer.weight)
    assert layer.bias is not None, "layers here have a bias"
    nn.init.zeros_(layer.bias)
    return layer


class Attention(nn.Module):
    """Self-attention over the positions of an image, with a residual: [B, C, H, W] to the same.

    torch's fused attention has no second derivatives: to compute them, run the forward pass under
    `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`.
    """

    recomputable = True

    def __init__(self, channels: int, num_heads: int = 1):
        """Prepare `num_heads` heads of channels / num_heads each."""
        super().__init__()
        self.num_heads = num_heads
        self.norm = group_norm(channels)
        self.qkv = PointwiseConv2d(channels, 3 * channels)
        self.out = zeroed(PointwiseConv2d(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """Give x plus what attention adds to it."""
        batch, channels, height, width = x.shape
        # In channels_last the permuted view is [B, places, 3 C] without a copy.
        qkv = self.qkv(self.norm(x)).permute(0, 2, 3, 1).reshape(batch, height * width, 3, -1)
        query, key, value = (
            part.reshape(batch, height * width, self.num_heads, -1).transpose(1, 2)
            for part in qkv.unbind(2)
        )
        h = _attend(query, key, value)
        h = h.transpose(1, 2).reshape(batch, height, width, channels).permute(0, 3, 1, 2)
        return x + self.out(h)


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return softmax(query key^T / sqrt(channels)) value of [B, heads, places, channels]."""
    if under_transform():  # torch's fused kernels have no forward-mode derivative
        weights = (query @ key.mT / math.sqrt(query.shape[-1])).softmax(-1)
        return weights @ value
    return functional.scaled_dot_product_attention(query, key, value)
