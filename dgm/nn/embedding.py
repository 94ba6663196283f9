"""Embedding of classes whose gradient is the same bytes each time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dgm.nn.kernels.choice import under_transform


class Embedding(nn.Embedding):
    """`nn.Embedding` with the gradient of `embed`."""

    def forward(self, labels: Tensor) -> Tensor:
        """Return the row of each label."""
        return embed(labels, self.weight)


def embed(labels: Tensor, weight: Tensor) -> Tensor:
    """Return weight[labels]: int64 [...] and [N, D] to [..., D].

    As `functional.embedding`, except that the weight's gradient is a matrix product. The code that
    torch.compile generates adds the rows of one label in no fixed order on a GPU, so that their sum
    rounds differently each time. For few classes: a label costs N multiplications, not an addition.
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
        """Return one_hot(labels)^T grad, [N, D], summed in fp32 at least."""
        (labels,) = ctx.saved_tensors
        # Not functional.one_hot: on a CPU it looks at the labels, which the compiler cannot.
        rows = torch.arange(ctx.num_rows, device=labels.device)
        dtype = torch.promote_types(grad.dtype, torch.float32)
        one_hot = (labels.flatten() == rows[:, None]).to(dtype)
        with torch.autocast(grad.device.type, enabled=False):
            return None, (one_hot @ grad.flatten(0, -2).to(dtype)).to(grad.dtype)
