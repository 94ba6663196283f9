"""What follows a backward pass, on a CPU: the gradient's norm, AdamW and the moving average.

With the gradient g, in update t of a weight w at the rate lr (Loshchilov and Hutter 2019,
algorithm 2):

    m = beta1 m + (1 - beta1) g,   v = beta2 v + (1 - beta2) g^2
    w = w (1 - lr weight_decay) - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

(weight decay of some of the weights only: see `dgm.train.optim.decayed_weights`)
and, of an average a, a = a + share (w - a). All this waits for memory alone, so what counts is how
often numbers are read and written: here once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dgm.kernels import native


@dataclass(frozen=True)
class Rule:
    """How AdamW updates, and what share of the weights an average takes in."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    share: float = 0.0


def gradient_norm(grads: Sequence[Tensor]) -> Tensor:
    """Compute the norm [] of all numbers of tensors, to 1e-7 of it; 0 without any."""
    norm = torch.empty(1)
    grads = [grad if is_dense(grad) else grad.contiguous() for grad in grads]
    native.call("gradient_norm", len(grads), _sizes(grads), _addresses(grads), norm)
    return norm[0]


def adamw_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    averages: Sequence[Tensor] | None,
    steps: Sequence[int],
    rule: Rule,
    decayed: Sequence[bool] | None = None,
) -> None:
    """Update weights, moments and averages in place; `steps` counts this update of each weight.

    `decayed` says which weights decay; None is all. The tensors of a weight are dense and laid out
    alike, in float32 on the CPU.
    """
    beta1, beta2 = rule.betas
    _check_layout(weights, grads, "gradient")
    _check_layout(weights, averages or weights, "average")
    sizes = {t: (rule.lr / (1 - beta1**t), (1 - beta2**t) ** 0.5) for t in set(steps)}
    kept = 1 - rule.lr * rule.weight_decay
    decays = [True] * len(weights) if decayed is None else decayed
    each = [(*sizes[t], kept if d else 1.0) for t, d in zip(steps, decays, strict=True)]
    native.call(
        "adamw", len(weights), _sizes(weights), _addresses(weights), _addresses(grads),
        _addresses(exp_avgs), _addresses(exp_avg_sqs),
        None if averages is None else _addresses(averages),
        torch.tensor(each, dtype=torch.float32), 1 - beta1, beta2, 1 - beta2, rule.eps, rule.share,
    )  # fmt: skip


def is_dense(tensor: Tensor) -> bool:
    """Return whether the numbers of a tensor fill a part of the memory, in whatever order."""
    if tensor.is_contiguous():
        return True
    size = 1
    for stride, length in sorted(_layout(tensor)):
        if stride != size:
            return False
        size *= length
    return True


def _layout(tensor: Tensor) -> list[tuple[int, int]]:
    # The stride of a dimension of length 1 means nothing.
    pairs = zip(tensor.stride(), tensor.shape, strict=True)
    return [(stride, length) for stride, length in pairs if length != 1]


def laid_out_alike(one: Tensor, other: Tensor) -> bool:
    """Return whether the numbers of two tensors lie in memory in the same order."""
    if one.shape != other.shape:
        return False
    return one.stride() == other.stride() or _layout(one) == _layout(other)


def _check_layout(weights: Sequence[Tensor], others: Sequence[Tensor], name: str) -> None:
    for weight, other in zip(weights, others, strict=True):
        if not laid_out_alike(weight, other):
            raise ValueError(
                f"the {name} of a weight has shape {tuple(other.shape)} and strides "
                f"{other.stride()}, the weight {tuple(weight.shape)} and {weight.stride()}"
            )


def _sizes(tensors: Sequence[Tensor]) -> Tensor:
    return torch.tensor([tensor.numel() for tensor in tensors], dtype=torch.int64)


def _addresses(tensors: Sequence[Tensor]) -> Tensor:
    for tensor in tensors:
        if tensor.dtype != torch.float32 or not tensor.is_cpu:
            raise TypeError(f"expected float32 on cpu, got {tensor.dtype} on {tensor.device}")
    return torch.tensor([tensor.data_ptr() for tensor in tensors], dtype=torch.int64)
