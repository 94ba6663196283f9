"""GroupNorm, scale and shift, SiLU and dropout as one operation on channels_last images.

With u = x + added, and x_hat = u less the mean of its group, over its deviation (Wu and He 2018),

    z = (weight x_hat + bias) (1 + scale) + shift,    y = keep silu(z) / (1 - drop).

On a GPU it is one Triton kernel each way, which reads and writes the training dtype and keeps
channels_last; torch's own GroupNorm there returns contiguous NCHW and runs in fp32 under autocast.
On a CPU it is one in C++ (norm.cpp), in fp32. Both keep x for the backward pass, and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dgm.kernels import native
from dgm.kernels.choice import Kernels, refuse_transform, under_transform
from dgm.kernels.norm_derivatives import backward_of_backward
from dgm.rng import Draws, purpose_id


@dataclass(frozen=True)
class Dropout:
    """Which features are dropped, by counter-based draws: no rank and no batch size shows."""

    share: float
    draws: Draws
    purpose: str


def norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    added: Tensor | None = None,
    scale_shift: tuple[Tensor, Tensor] | None = None,
    silu: bool = True,
    dropout: Dropout | None = None,
    kernels: Kernels | None = None,
) -> Tensor:
    """Normalise [B, C, H, W]; weight and bias are [C], the rest [B, C].

    Step by step, or in one of our `kernels` in the dtype of x, where those take it: they want 8 k
    places, and in C++ fp32. Both are differentiable to any order in reverse mode; in forward mode
    torch's own operators are used.
    """
    fits = x.shape[2] * x.shape[3] % 8 == 0 and not under_transform()
    if kernels and fits and (kernels == "triton" or native.serves(x, weight)):
        return _in_one_kernel(
            x, weight, bias, groups, eps, added, scale_shift, silu, dropout, kernels
        )
    u = x if added is None else x + added[:, :, None, None]
    if under_transform():
        u = u.contiguous()  # torch 2.11's forward-mode formula of group_norm needs it
    z = functional.group_norm(u, groups, weight, bias, eps)
    if scale_shift is not None:
        scale, shift = (part[:, :, None, None] for part in scale_shift)
        z = torch.addcmul(shift, z, scale + 1)
    y = functional.silu(z) if silu else z
    return y if dropout is None else keyed_dropout(y, dropout)


def keyed_dropout(x: Tensor, dropout: Dropout) -> Tensor:
    """Drop elements of [B, C, H, W]."""
    _, channels, height, width = x.shape
    keep = dropout.draws.keep_mask(dropout.purpose, (height, width, channels), dropout.share)
    kept = x * (1 / (1 - dropout.share))
    nothing = torch.zeros((), dtype=x.dtype, device=x.device)
    return torch.where(keep.permute(0, 3, 1, 2), kept, nothing)


Maybe = Tensor | None


def _in_one_kernel(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, added: Maybe,
    scale_shift: tuple[Tensor, Tensor] | None, silu: bool, dropout: Dropout | None,
    kernels: Kernels,
) -> Tensor:  # fmt: skip
    scale, shift = scale_shift or (None, None)
    key = index = step = None
    share, purpose = 0.0, 0
    if dropout is not None:
        key, index, step = dropout.draws.key, dropout.draws.index, dropout.draws.step
        share, purpose = dropout.share, purpose_id(dropout.purpose)
    y, _, _ = _forward(
        x, added, weight, bias, scale, shift, key, index, step,
        groups, eps, silu, share, purpose, kernels,
    )  # fmt: skip
    return y


@torch.library.custom_op("dgm::norm_act", mutates_args=())
def _forward(
    x: Tensor,
    added: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    key: Tensor | None,
    index: Tensor | None,
    step: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
    drop: float,
    purpose: int,
    kernels: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Give y, and the means and inverse deviations of the groups, fp32 [B, groups]."""
    refuse_transform("dgm::norm_act")
    x = x.contiguous(memory_format=torch.channels_last)
    y = torch.empty_like(x)
    mean = torch.empty(len(x), groups, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    told = [*map(_flat, (added, weight, bias, scale, shift, key, index, step))]
    if kernels == "native":
        options = _options(step, silu, drop, purpose)
        native.call("norm_act", *_sizes(x, groups), x, *told, *options, eps, y, mean, rstd)
        return y, mean, rstd
    from dgm.kernels import norm_triton

    launch = _Launch(x, added, scale, key, step, groups, silu, drop)
    norm_triton.forward[launch.grid](
        x, *told, y, mean, rstd,
        *launch.sizes, eps, purpose, *launch.dropping, **launch.constants,
    )  # fmt: skip
    return y, mean, rstd


@torch.library.custom_op("dgm::norm_act_backward", mutates_args=())
def _backward(
    grad: Tensor,
    x: Tensor,
    added: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    key: Tensor | None,
    index: Tensor | None,
    step: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
    eps: float,
    silu: bool,
    drop: float,
    purpose: int,
    kernels: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dx and fp32 [B, C] sums over H and W of dz, dz x_hat and du (empty without `added`).

    u = x + added, x_hat is u normalised, and z = a x_hat + b is the input of SiLU.
    """
    refuse_transform("dgm::norm_act_backward")
    x = x.contiguous(memory_format=torch.channels_last)
    grad = grad.contiguous(memory_format=torch.channels_last)
    dx = torch.empty_like(x)
    sums = _sums(x, added)
    told = [*map(_flat, (added, weight, bias, scale, shift, key, index, step))]
    found = [mean, rstd, grad, dx, *sums]
    if kernels == "native":
        options = _options(step, silu, drop, purpose)
        native.call("norm_act_backward", *_sizes(x, groups), x, *told, *options, *found)
        return dx, sums[0], sums[1], sums[2]
    from dgm.kernels import norm_triton

    launch = _Launch(x, added, scale, key, step, groups, silu, drop)
    norm_triton.backward[launch.grid](
        x, *told, *found, *launch.sizes, purpose, *launch.dropping, **launch.constants
    )
    return dx, sums[0], sums[1], sums[2]


def _sums(x: Tensor, added: Maybe) -> list[Tensor]:
    sizes = [x.shape[:2], x.shape[:2], (0,) if added is None else x.shape[:2]]
    return [torch.empty(size, dtype=torch.float32, device=x.device) for size in sizes]


def _sizes(x: Tensor, groups: int) -> tuple[int, ...]:
    batch, channels, height, width = x.shape
    return batch, height * width, channels, groups


def _dropping(drop: float) -> tuple[int, float]:
    """Give the 16-bit number below which one is dropped, and the factor of the others."""
    return round(drop * 65536), 1 / (1 - drop)


def _options(step: Maybe, silu: bool, drop: float, purpose: int) -> tuple[int | float, ...]:
    step_each = step is not None and step.ndim > 0
    return int(step_each), purpose, *_dropping(drop), int(silu)


class _Launch:
    """How a kernel is launched: some whole groups of one image for each program."""

    def __init__(
        self, x: Tensor, added: Maybe, scale: Maybe, key: Maybe, step: Maybe, groups: int,
        silu: bool, drop: float,
    ):  # fmt: skip
        batch, channels, height, width = x.shape
        group = channels // groups
        group_p2 = _power_of_2(group)
        held = max(1, min(_power_of_2(groups), 64 // group_p2))
        rows = max(8, min(_power_of_2(height * width), 4096 // (held * group_p2)))
        self.grid = (batch, -(-groups // held))
        self.sizes = (height * width // 8, channels, groups)
        self.dropping = _dropping(drop)
        self.constants: dict[str, Any] = {
            "GROUP": group,
            "GROUP_P2": group_p2,
            "HELD": held,
            "ROWS": rows,
            "HAS_ADDED": added is not None,
            "HAS_SCALE": scale is not None,
            "SILU": silu,
            "DROP": key is not None and drop > 0,
            "STEP_EACH": step is not None and step.ndim > 0,
        }


def _power_of_2(least: int) -> int:
    return 1 << (least - 1).bit_length()


def _flat(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


@_forward.register_fake
def _(x, added, weight, bias, scale, shift, key, index, step, groups, *rest):
    moments = torch.empty(len(x), groups, dtype=torch.float32, device=x.device)
    y = torch.empty_like(x, memory_format=torch.channels_last)
    return y, moments, torch.empty_like(moments)


@_backward.register_fake
def _(grad, x, added, *rest):
    return torch.empty_like(x, memory_format=torch.channels_last), *_sums(x, added)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, groups, eps, silu, drop, purpose, kernels = inputs
    ctx.save_for_backward(*tensors, output[1], output[2])
    ctx.settings = groups, eps, silu, drop, purpose, kernels
    ctx.mark_non_differentiable(output[1], output[2])


def _gradients(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    x, added, weight, bias, scale, shift, *rest = ctx.saved_tensors
    dx, by_one, by_x_hat, of_added = _backward(
        grad, x, added, weight, bias, scale, shift, *rest, *ctx.settings
    )
    factor = 1.0 if scale is None else 1 + scale.float()
    d_weight = (factor * by_x_hat).sum(0).to(weight.dtype)
    d_bias = (factor * by_one).sum(0).to(bias.dtype)
    d_added = None if added is None else of_added.to(added.dtype)
    d_scale = d_shift = None
    if scale is not None and shift is not None:
        d_scale = (weight * by_x_hat + bias * by_one).to(scale.dtype)
        d_shift = by_one.to(shift.dtype)
    return dx, d_added, d_weight, d_bias, d_scale, d_shift, *(None,) * 9


_forward.register_autograd(_gradients, setup_context=_remember)


def _remember_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    # Not mean and rstd: they are functions of x, and their derivatives are part of that by x.
    ctx.save_for_backward(*inputs[:10])
    ctx.settings = inputs[12:]
    ctx.set_materialize_grads(False)


def _second_gradients(ctx: Any, *came: Tensor | None) -> tuple[Any, ...]:
    *given, key, index, step = ctx.saved_tensors
    groups, eps, silu, drop, purpose, kernels = ctx.settings
    kept = None
    if key is not None and drop > 0:
        # With x = 0, weight 0, bias 1 and no SiLU the kernel returns the dropout factors alone.
        x, weight = given[1].detach().float(), given[3].detach().float()
        kept, _, _ = _forward(
            torch.zeros_like(x), None, torch.zeros_like(weight), torch.ones_like(weight), None,
            None, key, index, step, groups, eps, False, drop, purpose, kernels,
        )  # fmt: skip
    wanted = ctx.needs_input_grad[:7]
    found = backward_of_backward(given, wanted, came, groups, eps, silu, kept)
    return *found, *(None,) * 11


_backward.register_autograd(_second_gradients, setup_context=_remember_backward)
