"""Layers shared by the families."""

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
from dgm.nn.kernels.dispatch import Kernels, kernels_for, under_transform
from dgm.nn.kernels.norm import Dropout, norm_act, reads_separately


class NormAct(nn.GroupNorm):
    """GroupNorm with the scale and shift, SiLU and dropout that follow it in a block."""

    kernels: Kernels | None = None  # set by `use_kernels`

    def __init__(self, groups: int, channels: int, silu: bool):
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
        """Normalize concat(x, skip) + added; added, scale and shift are [B, C]."""
        if dropout is not None and dropout.p == 0:
            dropout = None
        return norm_act(
            x, self.weight, self.bias, self.num_groups, self.eps,
            added, scale_shift, self.silu, dropout, self.kernels, skip,
        )  # fmt: skip

    def reads_separately(self, x: Tensor) -> bool:
        """Return whether x and `skip` are read separately, without concatenating them."""
        return reads_separately(self.kernels, x, self.weight, self.num_groups)


class DeferredBiasConv2d(nn.Conv2d):
    """A convolution whose bias is added by the next layer, which saves a pass."""

    native = False  # set by `use_kernels`

    def forward(self, x: Tensor, added: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Return the convolution without bias, and `added` [B, C] plus the bias."""
        assert self.bias is not None, "the layer is built with a bias"
        bias = self.bias.expand(x.shape[0], -1) if added is None else added + self.bias
        if self.native:
            return winograd.convolve(self, x, bias=False), bias
        return self._conv_forward(x, self.weight, None), bias


class PointwiseConv2d(nn.Conv2d):
    """A 1x1 convolution as a matrix product over the positions of channels_last images."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, 1)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """Map concat(x, skip), [B, C, H, W], without concatenating them."""
        weight = self.weight.flatten(1)
        x = x.permute(0, 2, 3, 1)
        if skip is None:
            y = functional.linear(x, weight, self.bias)
        else:
            weight_x, weight_skip = weight.split([x.shape[-1], skip.shape[1]], dim=1)
            y = functional.linear(x, weight_x, self.bias)
            y = y + functional.linear(skip.permute(0, 2, 3, 1), weight_skip)
        return y.permute(0, 3, 1, 2)


def group_norm(channels: int, silu: bool = False) -> NormAct:
    """Return a GroupNorm of at most 32 groups of at least 4 channels (fewer groups if uneven)."""
    groups = next(g for g in range(min(32, max(1, channels // 4)), 0, -1) if channels % g == 0)
    return NormAct(groups, channels, silu)


def use_kernels(net: nn.Module, device: torch.device | None = None) -> None:
    """Use this package's kernels in a network on `device` (default: that of its parameters)."""
    kernels = kernels_for(next(net.parameters()).device if device is None else device)
    for module in net.modules():
        if isinstance(module, NormAct):
            module.kernels = kernels
        elif isinstance(module, DeferredBiasConv2d):
            module.native = kernels == "native" and winograd.is_supported(module)
    if kernels == "native":
        winograd.use_in(net)


def recompute_activations(net: nn.Module) -> int:
    """Checkpoint the activations of each `recomputable` module; return the number of modules.

    Only a module's input is kept; the backward pass recomputes the rest (Chen et al. 2016) with
    the same dropout, which depends on no generator state.
    """
    modules = [module for module in net.modules() if getattr(module, "recomputable", False)]
    for module in modules:
        module.forward = functools.partial(_checkpointed, module.forward)
    return len(modules)


def _checkpointed(forward: Callable[..., Tensor], *args: Any, **named: Any) -> Tensor:
    """Call `forward` with checkpointing, which torch supports in reverse mode only."""
    if under_transform():
        return forward(*args, **named)
    out: Tensor = checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **named)
    return out


def upsample(x: Tensor) -> Tensor:
    """Upsample [B, C, H, W] by 2 with nearest neighbors."""
    return repeat_pixels(x) if x.is_cuda else functional.interpolate(x, scale_factor=2)


def repeat_pixels(x: Tensor) -> Tensor:
    """Upsample by broadcasting, so that the gradient is a plain sum of four pixels.

    Compiled for a GPU, the backward pass of `interpolate` adds by atomics: in no fixed order, and
    into fp32 NCHW memory, which the preceding convolution has to copy.
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


def timestep_embedding(t: Tensor, channels: int) -> Tensor:
    """Embed t [B] in sines and cosines, float32 [B, channels] (Vaswani et al. 2017, 3.5)."""
    half = channels // 2
    exponent = torch.arange(half, dtype=torch.float32, device=t.device) / max(half - 1, 1)
    angles = t.to(torch.float32)[:, None] * torch.exp(-math.log(10_000) * exponent)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def join(h: Tensor, skip: Tensor) -> Tensor:
    """Concatenate the channels of two images [B, C, H, W].

    Unlike `torch.cat`, the gradient of h is channels_last: a view of some channels would be copied
    by each convolution that it flows back to.
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
        grad_h = grad[:, : ctx.channels].contiguous(memory_format=torch.channels_last)
        return grad_h, grad[:, ctx.channels :]


Conv = TypeVar("Conv", bound=nn.Conv2d)


def zeroed(layer: Conv) -> Conv:
    """Zero a convolution's weights and bias, so that its block starts as the identity; return it.

    The U-Net's other layers keep torch's initialization, whose weights are smaller than those of
    DDPM's variance scaling: Adam changes them faster, relative to their size, and small networks
    learn in a fraction of the steps.
    """
    nn.init.zeros_(layer.weight)
    assert layer.bias is not None, "the layer is built with a bias"
    nn.init.zeros_(layer.bias)
    return layer


class Attention(nn.Module):
    """Self-attention over the positions of an image, with a residual: [B, C, H, W] to the same.

    torch's fused attention has no second derivatives: to compute them, run the forward pass under
    `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`.
    """

    recomputable = True

    def __init__(self, channels: int, num_heads: int = 1):
        """Build `num_heads` heads of channels / num_heads each."""
        super().__init__()
        self.num_heads = num_heads
        self.norm = group_norm(channels)
        self.qkv = PointwiseConv2d(channels, 3 * channels)
        self.out = zeroed(PointwiseConv2d(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """Return x + attention(norm(x))."""
        batch, channels, height, width = x.shape
        # In channels_last the permuted view is [B, positions, 3 C] without a copy.
        qkv = self.qkv(self.norm(x)).permute(0, 2, 3, 1).reshape(batch, height * width, 3, -1)
        query, key, value = (
            part.reshape(batch, height * width, self.num_heads, -1).transpose(1, 2)
            for part in qkv.unbind(2)
        )
        h = _attend(query, key, value)
        h = h.transpose(1, 2).reshape(batch, height, width, channels).permute(0, 3, 1, 2)
        return x + self.out(h)


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return softmax(query key^T / sqrt(channels)) value of [B, heads, positions, channels]."""
    if under_transform():  # torch's fused kernels have no forward-mode derivative
        weights = (query @ key.mT / math.sqrt(query.shape[-1])).softmax(-1)
        return weights @ value
    return functional.scaled_dot_product_attention(query, key, value)


class Embedding(nn.Embedding):
    """`nn.Embedding` with the deterministic gradient of `embed`."""

    def forward(self, labels: Tensor) -> Tensor:
        """Return the row of each label."""
        return embed(labels, self.weight)


def embed(labels: Tensor, weight: Tensor) -> Tensor:
    """Return weight[labels]: int64 [...] and [N, D] to [..., D].

    Unlike `functional.embedding`, the weight's gradient is a matrix product and so deterministic:
    compiled for a GPU, torch adds the rows of a label in no fixed order. Meant for few classes,
    since the cost grows with N.
    """
    if under_transform():
        return functional.embedding(labels, weight)
    rows: Tensor = _Embed.apply(labels, weight)
    return rows


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(labels: Tensor, weight: Tensor) -> Tensor:
        return functional.embedding(labels, weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        labels, weight = inputs
        ctx.save_for_backward(labels)
        ctx.num_rows = weight.shape[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        """Return one_hot(labels)^T grad, [N, D], summed in fp32 or fp64."""
        (labels,) = ctx.saved_tensors
        # Not functional.one_hot, whose check of the labels' values on a CPU cannot be compiled.
        rows = torch.arange(ctx.num_rows, device=labels.device)
        dtype = torch.promote_types(grad.dtype, torch.float32)
        one_hot = (labels.flatten() == rows[:, None]).to(dtype)
        with torch.autocast(grad.device.type, enabled=False):
            return None, (one_hot @ grad.flatten(0, -2).to(dtype)).to(grad.dtype)
