"""What follows a backward pass, on a CPU: the gradient's norm, AdamW and the moving average.

With the gradient g, in update t of a weight w at the rate lr (Loshchilov and Hutter 2019,
algorithm 2):

    m = beta1 m + (1 - beta1) g,   v = beta2 v + (1 - beta2) g^2
    w = w (1 - lr weight_decay) - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

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
    """Compute the norm [] of all numbers of dense tensors, to 1e-7 of it."""
    norm = torch.empty(1)
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
) -> None:
    """Update weights, moments and averages in place; `steps` counts this update of each weight.

    The tensors of a weight are dense and laid out alike, in float32 on the CPU.
    """
    beta1, beta2 = rule.betas
    sizes = {t: (rule.lr / (1 - beta1**t), (1 - beta2**t) ** 0.5) for t in set(steps)}
    native.call(
        "adamw", len(weights), _sizes(weights), _addresses(weights), _addresses(grads),
        _addresses(exp_avgs), _addresses(exp_avg_sqs),
        None if averages is None else _addresses(averages),
        torch.tensor([sizes[t] for t in steps]), 1 - beta1, beta2, 1 - beta2, rule.eps,
        1 - rule.lr * rule.weight_decay, rule.share,
    )  # fmt: skip


def _sizes(tensors: Sequence[Tensor]) -> Tensor:
    return torch.tensor([tensor.numel() for tensor in tensors])


def _addresses(tensors: Sequence[Tensor]) -> Tensor:
    return torch.tensor([tensor.data_ptr() for tensor in tensors])
