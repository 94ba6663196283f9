"""Second derivatives of `norm_act`, by differentiating torch's own operators twice.

With a = weight (1 + scale) and b = bias (1 + scale) + shift, both [B, C], `norm_act` computes
y = dropout_factors silu(a x_hat + b). Its backward operator returns the derivatives of
sum(grad y) by x, b, a and `added`. Here these four are computed once more with a graph, so that
autograd can differentiate them, to any order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Maybe = Tensor | None


def backward_of_backward(
    inputs: Sequence[Maybe],
    needs_grad: Sequence[bool],
    cotangents: Sequence[Maybe],
    groups: int,
    eps: float,
    silu: bool,
    dropout_factors: Maybe,
) -> list[Maybe]:
    """Return the vector-Jacobian products of the backward operator with `cotangents`.

    One for each of `inputs` (grad, x, skip, added, weight, bias, scale, shift), None if not
    `needs_grad`. The operator returns dx, d_skip and three sums [B, C]; `dropout_factors` are
    [B, C, H, W].
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # On detached copies: `grad` may depend on x, and that path is not part of this derivative.
        nodes = [_node(tensor) for tensor in inputs]
        results = _first_derivatives(nodes, groups, eps, silu, dropout_factors)
        pairs = zip(results, cotangents, strict=True)
        used = [(r, g) for r, g in pairs if r is not None and g is not None]
        needed = [n for n, needs in zip(nodes, needs_grad, strict=True) if needs and n is not None]
        if not used or not needed:
            return [None] * len(nodes)
        gradients = iter(
            torch.autograd.grad(
                [result for result, _ in used],
                needed,
                [grad for _, grad in used],
                create_graph=create_graph,
                allow_unused=True,
            )
        )
    return [next(gradients) if needs else None for needs in needs_grad]


def _node(tensor: Maybe) -> Maybe:
    if tensor is None:
        return None
    return tensor.view_as(tensor) if tensor.requires_grad else tensor.detach().requires_grad_()


def _first_derivatives(
    inputs: Sequence[Any], groups: int, eps: float, silu: bool, dropout_factors: Maybe
) -> tuple[Maybe, ...]:
    """Return dx, d_skip and fp32 [B, C] sums over H and W of dz, dz x_hat and du."""
    grad, x_in, skip, added, weight, bias, scale, shift = inputs
    x = x_in if skip is None else torch.cat([x_in, skip], dim=1)
    factor = 1.0 if scale is None else 1 + scale.float()
    a = (weight.float() * factor).expand(x.shape[:2])
    b = (bias.float() * factor + (0.0 if shift is None else shift.float())).expand(x.shape[:2])
    offset = torch.zeros_like(a, requires_grad=True) if added is None else added
    u = x.float() + offset.float()[:, :, None, None]
    centered = u.reshape(len(x), groups, -1)
    centered = centered - centered.mean(2, keepdim=True)
    x_hat = centered * torch.rsqrt(centered.square().mean(2, keepdim=True) + eps)
    y = a[:, :, None, None] * x_hat.reshape(x.shape) + b[:, :, None, None]
    y = functional.silu(y) if silu else y
    y = y if dropout_factors is None else y * dropout_factors
    images = (x_in,) if skip is None else (x_in, skip)
    *d_images, d_a, d_b, d_offset = torch.autograd.grad(
        y, (*images, a, b, offset), grad.float(), create_graph=True
    )
    return d_images[0], None if skip is None else d_images[1], d_b, d_a, d_offset
