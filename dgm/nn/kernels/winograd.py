"""3x3 convolutions of channels_last images on a CPU, by Winograd's minimal filtering F(4x4, 3x3).

The code is winograd.cpp: a quarter of the multiplications of a direct convolution, with rounding
errors of about 1e-5 of the largest output.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.grad import conv2d_input, conv2d_weight
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from dgm.nn.kernels import native
from dgm.nn.kernels.dispatch import (
    channels_last,
    empty_channels_last,
    refuse_transform,
    under_transform,
)

_CHANNELS = 32  # numbers of channels must be multiples of this
_MIN_POSITIONS = 64  # fewer use torch's convolution, at any batch size


def is_supported(layer: nn.Conv2d) -> bool:
    """Return whether a layer is a convolution of the supported kind."""
    return (
        layer.kernel_size == (3, 3)
        and layer.padding == (1, 1)
        and layer.stride == layer.dilation == (1, 1)
        and layer.groups == 1
        and layer.padding_mode == "zeros"
        and layer.in_channels % _CHANNELS == layer.out_channels % _CHANNELS == 0
    )


def use_in(net: nn.Module) -> None:
    """Use this kernel for the supported convolutions of a network."""
    for module in net.modules():
        if type(module) is nn.Conv2d and is_supported(module):
            module.forward = functools.partial(convolve, module)  # type: ignore[method-assign]


def convolve(layer: nn.Conv2d, x: Tensor, bias: bool = True) -> Tensor:
    """Apply a 3x3 convolution to x [B, C, H, W], by this kernel or, where unsupported, by torch's.

    The bias is left out if `bias` is False. Differentiable to any order in reverse mode; torch's
    convolution is used in forward mode.
    """
    height, width = x.shape[2:]
    fits = height % 4 == width % 4 == 0 and height * width >= _MIN_POSITIONS
    if not fits or under_transform() or not native.supports(x, layer.weight):
        return functional.conv2d(x, layer.weight, layer.bias if bias else None, padding=1)
    zeros = layer.weight.new_zeros(layer.out_channels)
    return _forward(x, layer.weight, layer.bias if bias and layer.bias is not None else zeros)


@torch.library.custom_op("dgm::conv3x3", mutates_args=())
def _forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return y [B, K, H, W]."""
    refuse_transform("dgm::conv3x3")
    x, weight = channels_last(x), channels_last(weight)
    batch, inputs, height, width = x.shape
    outputs = len(weight)
    u_t = x.new_empty(36, inputs, outputs)
    native.call("transform_weight", inputs, outputs, weight, None, u_t)
    y = empty_channels_last(x, outputs)
    native.call("convolve", batch, height, width, inputs, outputs, x, u_t, bias.contiguous(), y)
    return y


@torch.library.custom_op("dgm::conv3x3_backward", mutates_args=())
def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and weight; empty where not needed."""
    refuse_transform("dgm::conv3x3_backward")
    grad, x, weight = channels_last(grad), channels_last(x), channels_last(weight)
    batch, inputs, height, width = x.shape
    outputs = len(weight)
    u = x.new_empty(36, outputs, inputs)
    sizes = batch, height, width, inputs, outputs
    dx, dw = x.new_empty(0), x.new_empty(0)
    if need_x:
        dx = empty_channels_last(x, inputs)
        native.call("transform_weight", inputs, outputs, weight, u, None)
        native.call("gradient_of_image", *sizes, grad, u, dx)
    if need_weight and not batch:
        dw = torch.zeros_like(weight)  # with an empty batch the kernel's buffer is uninitialized
    elif need_weight:
        dw = torch.empty_like(weight)
        work = x.new_empty(native.call("work_size", inputs, outputs))
        native.call("gradient_of_weight", *sizes, x, grad, u, work, dw)
    return dx, dw


@_forward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return empty_channels_last(x, len(weight))


@_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    dx = empty_channels_last(x, x.shape[1]) if need_x else x.new_empty(0)
    dw = torch.empty_like(channels_last(weight)) if need_weight else x.new_empty(0)
    return dx, dw


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    need_x, need_weight, need_bias = ctx.needs_input_grad
    d_bias = grad.sum((0, 2, 3)) if need_bias else None
    if torch.is_grad_enabled():  # to be differentiated again, as only torch's convolution can be
        dx = conv2d_input(x.shape, weight, grad, padding=1) if need_x else None
        dw = conv2d_weight(x, weight.shape, grad, padding=1) if need_weight else None
        return dx, dw, d_bias
    dx, dw = _backward(grad, x, weight, need_x, need_weight)
    return dx if need_x else None, dw if need_weight else None, d_bias


_forward.register_autograd(_gradients, setup_context=_save)


@register_flop_formula(torch.ops.dgm.conv3x3)
def _count(x: Any, weight: Any, bias: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Return the FLOPs of a direct convolution, for comparison."""
    return conv_flop_count(x, weight, [x[0], weight[0], *x[2:]])
