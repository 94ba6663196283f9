"""Second derivatives of `norm_act`, by differentiating torch's own operators twice.

With a = weight (1 + scale) and b = bias (1 + scale) + shift, both [B, C], `norm_act` computes
y = kept silu(a x_hat + b). Its backward operator returns the derivatives of sum(grad y) by x, b, a
and `added`. Here these four are computed once more in a graph, so that they can be differentiated
in turn, to any order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Maybe = Tensor | None


def backward_of_backward(
    given: Sequence[Maybe],
    wanted: Sequence[bool],
    came: Sequence[Maybe],
    groups: int,
    eps: float,
    silu: bool,
    kept: Maybe,
) -> list[Maybe]:
    """Return the derivatives of sum(came * results) by the `wanted` of `given`, None elsewhere.

    `given` are grad, x, added, weight, bias, scale and shift. The results are dx and the sums that
    the backward operator returns; `kept` [B, C, H, W] are the factors of dropout.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Of fresh tensors, as `grad` may be a function of x: only what happens here counts.
        nodes = [_node(tensor) for tensor in given]
        results = _first_derivatives(nodes, groups, eps, silu, kept)
        used = [(r, g) for r, g in zip(results, came, strict=True) if g is not None]
        pairs = zip(nodes, wanted, strict=True)
        asked = [node for node, want in pairs if want and node is not None]
        if not used or not asked:
            return [None] * len(nodes)
        found = iter(
            torch.autograd.grad(
                [result for result, _ in used],
                asked,
                [grad for _, grad in used],
                create_graph=create_graph,
                allow_unused=True,
            )
        )
    return [next(found) if want else None for want in wanted]


def _node(tensor: Maybe) -> Maybe:
    if tensor is None:
        return None
    return tensor.view_as(tensor) if tensor.requires_grad else tensor.detach().requires_grad_()


def _first_derivatives(
    given: Sequence[Any], groups: int, eps: float, silu: bool, kept: Maybe
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dx, and sums over places, fp32 [B, C]: of dz, of dz x_hat, of du."""
    grad, x, added, weight, bias, scale, shift = given
    factor = 1.0 if scale is None else 1 + scale.float()
    a = (weight.float() * factor).expand(x.shape[:2])
    b = (bias.float() * factor + (0.0 if shift is None else shift.float())).expand(x.shape[:2])
    moved = torch.zeros_like(a, requires_grad=True) if added is None else added
    u = x.float() + moved.float()[:, :, None, None]
    centered = u.reshape(len(x), groups, -1)
    centered = centered - centered.mean(2, keepdim=True)
    x_hat = centered * torch.rsqrt(centered.square().mean(2, keepdim=True) + eps)
    y = a[:, :, None, None] * x_hat.reshape(x.shape) + b[:, :, None, None]
    y = functional.silu(y) if silu else y
    y = y if kept is None else y * kept
    dx, by_a, by_b, by_added = torch.autograd.grad(
        y, (x, a, b, moved), grad.float(), create_graph=True
    )
    return dx, by_b, by_a, by_added
