"""GroupNorm, scale and shift, SiLU and dropout as one operation on channels_last images.

With u = x + added, and x_hat = u normalized over its group (Wu and He 2018),

    z = (weight x_hat + bias) (1 + scale) + shift,    y = keep silu(z) / (1 - drop).

On a GPU the forward and the backward pass are one Triton kernel each. They read and write the
training dtype and keep channels_last; torch's own GroupNorm there returns contiguous NCHW and runs
in fp32 under autocast. Saved for the backward pass are x, and a bit per element for dropout; x may
be given as two tensors, `x` and `skip`, concatenated by channels.

On a CPU the operation is a C++ kernel (norm.cpp), in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dgm.nn.kernels import native, norm_gpu
from dgm.nn.kernels.dispatch import (
    Kernels,
    channels_last,
    empty_channels_last,
    refuse_transform,
    triton_runs_on,
    under_transform,
)
from dgm.rng import Draws, purpose_id


@dataclass(frozen=True)
class Dropout:
    """Dropout by counter-based draws, independent of the number of ranks and the batch size."""

    p: float
    draws: Draws
    purpose: str


def norm_act(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, added: Tensor | None = None,
    scale_shift: tuple[Tensor, Tensor] | None = None, silu: bool = True,
    dropout: Dropout | None = None, kernels: Kernels | None = None, skip: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Normalize concat(x, skip), [B, C, H, W]; weight and bias are [C], the rest [B, C].

    Uses `kernels`, in the dtype of x, where `choose` allows, else torch's operators. Both are
    differentiable to any order in reverse mode; forward mode always uses torch's.
    """
    if skip is not None and not reads_separately(kernels, x, weight, groups):
        x, skip = torch.cat([x, skip], dim=1), None
    kernels = choose(kernels, x, weight, groups)
    if kernels:
        scale, shift = scale_shift or (None, None)
        key = index = step = None
        p, purpose = 0.0, 0
        if dropout is not None:
            key, index, step = dropout.draws.key, dropout.draws.index, dropout.draws.step
            p, purpose = dropout.p, purpose_id(dropout.purpose)
        y, *_ = _forward(
            x, skip, added, weight, bias, scale, shift, key, index, step,
            groups, eps, silu, p, purpose, kernels,
        )  # fmt: skip
        return y
    u = x if added is None else x + added[:, :, None, None]
    if under_transform():
        u = u.contiguous()  # torch 2.11's forward-mode formula of group_norm needs it
    z = functional.group_norm(u, groups, weight, bias, eps)
    if scale_shift is not None:
        scale, shift = (part[:, :, None, None] for part in scale_shift)
        z = torch.addcmul(shift, z, scale + 1)
    y = functional.silu(z) if silu else z
    return y if dropout is None else counter_dropout(y, dropout)


def choose(kernels: Kernels | None, x: Tensor, weight: Tensor, groups: int) -> Kernels | None:
    """Return the kernels that normalize x, or None for torch's operators.

    H W has to be a multiple of 8. Triton needs a GPU and groups of at most 64 channels; C++ needs
    fp32 on a CPU, and is also used if `kernels` is triton but x is on a CPU.
    """
    if kernels is None or under_transform() or x.shape[2] * x.shape[3] % 8:
        return None
    if kernels == "triton" and triton_runs_on(x.device):
        return kernels if len(weight) // groups <= norm_gpu.MAX_GROUP else None
    return "native" if native.supports(x, weight) else None


def reads_separately(kernels: Kernels | None, x: Tensor, weight: Tensor, groups: int) -> bool:
    """Return whether x and `skip` are read separately, without concatenating them.

    Not if the image is too large for one pass: the two-pass kernel has no registers left for it.
    """
    on_triton = choose(kernels, x, weight, groups) == "triton"
    return on_triton and norm_gpu.Tile(x, len(weight), groups).whole


def counter_dropout(x: Tensor, dropout: Dropout) -> Tensor:
    """Apply dropout to [B, C, H, W]."""
    _, channels, height, width = x.shape
    keep = dropout.draws.keep_mask(dropout.purpose, (height, width, channels), dropout.p)
    zero = torch.zeros((), dtype=x.dtype, device=x.device)
    return torch.where(keep.permute(0, 3, 1, 2), x * (1 / (1 - dropout.p)), zero)


@torch.library.custom_op("dgm::norm_act", mutates_args=())
def _forward(
    x: Tensor, skip: Tensor | None, added: Tensor | None, weight: Tensor, bias: Tensor,
    scale: Tensor | None, shift: Tensor | None,
    key: Tensor | None, index: Tensor | None, step: Tensor | None,
    groups: int, eps: float, silu: bool, drop: float, purpose: int, kernels: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return y, mean and inverse standard deviation of each group, fp32 [B, groups], and a mask.

    The mask holds the dropout's bits, uint8 [B, H W / 8, C], for the kernels in Triton; else [0].
    """
    refuse_transform("dgm::norm_act")
    affine, draws = [added, weight, bias, scale, shift], [key, index, step]
    if kernels == "triton":
        return norm_gpu.forward(x, skip, affine, draws, groups, eps, silu, drop, purpose)
    x = channels_last(x)
    y = torch.empty_like(x)
    mean = torch.empty(len(x), groups, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    options = _options(step, silu, drop, purpose)
    flat = map(norm_gpu.contiguous, (*affine, *draws))
    native.call("norm_act", *_sizes(x, groups), x, *flat, *options, eps, y, mean, rstd)
    return y, mean, rstd, x.new_empty(0, dtype=torch.uint8)


@torch.library.custom_op("dgm::norm_act_backward", mutates_args=())
def _backward(
    grad: Tensor, x: Tensor, skip: Tensor | None, added: Tensor | None, weight: Tensor,
    bias: Tensor, scale: Tensor | None, shift: Tensor | None,
    key: Tensor | None, index: Tensor | None, step: Tensor | None,
    mean: Tensor, rstd: Tensor, mask: Tensor,
    groups: int, eps: float, silu: bool, drop: float, purpose: int, kernels: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return dx, d_skip and fp32 [B, C] sums over H and W of dz, dz x_hat and du.

    u = x + added, x_hat is u normalized, and z = a x_hat + b is the input of SiLU. Gradients of
    absent tensors are empty, [0].
    """
    refuse_transform("dgm::norm_act_backward")
    affine = [added, weight, bias, scale, shift]
    if kernels == "triton":
        dx, d_skip, sums = norm_gpu.backward(
            grad, x, skip, affine, mask, mean, rstd, groups, silu, drop
        )
        return dx, d_skip, sums[0], sums[1], sums[2]
    x, grad = channels_last(x), channels_last(grad)
    dx, sums = torch.empty_like(x), norm_gpu.empty_sums(x, skip, added)
    flat = map(norm_gpu.contiguous, (*affine, key, index, step))
    options = _options(step, silu, drop, purpose)
    rest = [mean, rstd, grad, dx, *sums]
    native.call("norm_act_backward", *_sizes(x, groups), x, *flat, *options, *rest)
    return dx, x.new_empty(0), sums[0], sums[1], sums[2]


def _sizes(x: Tensor, groups: int) -> tuple[int, ...]:
    batch, channels, height, width = x.shape
    return batch, height * width, channels, groups


def _options(step: Tensor | None, silu: bool, drop: float, purpose: int) -> tuple[int | float, ...]:
    step_each = step is not None and step.ndim > 0
    return int(step_each), purpose, *norm_gpu.threshold_and_factor(drop), int(silu)


@_forward.register_fake
def _(
    x, skip, added, weight, bias, scale, shift, key, index, step, groups, eps, silu, drop, purpose,
    kernels,
):  # fmt: skip
    moments = torch.empty(x.shape[0], groups, dtype=torch.float32, device=x.device)
    dropping = kernels == "triton" and key is not None and drop > 0
    mask = norm_gpu.empty_mask(x, skip, dropping)
    y = empty_channels_last(x, norm_gpu.joined_channels(x, skip))
    return y, moments, torch.empty_like(moments), mask


@_backward.register_fake
def _(grad, x, skip, added, *rest):
    dx = torch.empty_like(x, memory_format=torch.channels_last)
    d_skip = x.new_empty(0)
    if skip is not None:
        d_skip = torch.empty_like(skip, memory_format=torch.channels_last)
    return dx, d_skip, *norm_gpu.empty_sums(x, skip, added)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, groups, eps, silu, drop, purpose, kernels = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.settings = groups, eps, silu, drop, purpose, kernels
    ctx.mark_non_differentiable(*output[1:])


def _gradients(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    if torch.is_grad_enabled():
        return _differentiable_gradients(ctx, grad)
    x, skip, added, weight, bias, scale, shift, *rest = ctx.saved_tensors
    dx, d_skip, sum_dz, sum_dz_x_hat, sum_du = _backward(
        grad, x, skip, added, weight, bias, scale, shift, *rest, *ctx.settings
    )
    factor = 1.0 if scale is None else 1 + scale.float()
    d_weight = (factor * sum_dz_x_hat).sum(0).to(weight.dtype)
    d_bias = (factor * sum_dz).sum(0).to(bias.dtype)
    d_added = None if added is None else sum_du.to(added.dtype)
    d_scale = d_shift = None
    if scale is not None and shift is not None:
        d_scale = (weight * sum_dz_x_hat + bias * sum_dz).to(scale.dtype)
        d_shift = sum_dz.to(shift.dtype)
    d_skip = None if skip is None else d_skip
    return dx, d_skip, d_added, d_weight, d_bias, d_scale, d_shift, *(None,) * 9


def _differentiable_gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Return the gradients by torch's operators, which can be differentiated again."""
    *inputs, key, index, step, _, _, _ = ctx.saved_tensors
    groups, eps, silu, drop, purpose, kernels = ctx.settings
    # Views, because one input may be a function of another: that path is no part of the gradient.
    nodes: list[Any] = [None if tensor is None else tensor.view_as(tensor) for tensor in inputs]
    wide: list[Any] = [None if node is None else node.float() for node in nodes]
    x, skip, added, weight, bias, scale, shift = wide
    x = x if skip is None else torch.cat([x, skip], dim=1)
    scale_shift = None if scale is None else (scale, shift)
    y = norm_act(x, weight, bias, groups, eps, added, scale_shift, silu)
    if key is not None and drop > 0:
        # With x = 0, weight 0, bias 1 and no SiLU the kernel returns the dropout factors alone.
        zeros, zero = torch.zeros_like(y.detach()), torch.zeros_like(weight.detach())
        factors, *_ = _forward(
            zeros, None, None, zero, zero + 1, None, None, key, index, step,
            groups, eps, False, drop, purpose, kernels,
        )  # fmt: skip
        y = y * factors
    needs = ctx.needs_input_grad[: len(nodes)]
    needed = [node for node, need in zip(nodes, needs, strict=True) if need]
    found = iter(torch.autograd.grad(y, needed, grad.float(), create_graph=True))
    return *(next(found) if need else None for need in needs), *(None,) * 9


_forward.register_autograd(_gradients, setup_context=_save)
