"""Fused optimizer step on a CPU: the gradient's norm, AdamW and the moving average.

Update t of a weight w with gradient g and learning rate lr is (Loshchilov and Hutter 2019,
algorithm 2):

    m = beta1 m + (1 - beta1) g,   v = beta2 v + (1 - beta2) g^2
    w = w (1 - lr weight_decay) - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

and for a moving average a, a = a + ema_weight (w - a). `dgm.training.optimizer.decayed_weights`
selects the weights that decay. The update is memory-bound; fused, it reads and writes every
tensor once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter, methodcaller

import torch
from torch import Tensor

from dgm.nn.kernels import native

_KIND = attrgetter("dtype", "is_cpu")
_STRIDE = methodcaller("stride")


@dataclass(frozen=True)
class AdamWConfig:
    """Hyperparameters of AdamW; `ema_weight` is that of the new weights in the moving average."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    ema_weight: float = 0.0


def gradient_norm(grads: Sequence[Tensor]) -> Tensor:
    """Return the L2 norm of all gradients together, fp32 [], relative error 1e-7; 0 if none."""
    norm = torch.empty(1)
    _check_dtypes(*grads)
    grads = [grad if is_dense(grad) else grad.contiguous() for grad in grads]
    native.call("gradient_norm", len(grads), _sizes(grads), _addresses(grads), norm)
    return norm[0]


def adamw_(
    weights: Sequence[Tensor], grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor], averages: Sequence[Tensor] | None,
    steps: Sequence[int], config: AdamWConfig, decayed: Sequence[bool] | None = None,
) -> None:  # fmt: skip
    """Update weights, moments and averages in place.

    `steps`: number of updates of each weight, this one included; `decayed`: which weights decay,
    None for all. All tensors are dense float32 on the CPU. Those of one weight have equal strides,
    except for the gradient, which may be strided in any way.
    """
    beta1, beta2 = config.betas
    _check_dtypes(*grads, *(averages or ()))
    grads = with_strides_of(weights, grads)
    step_sizes = {t: (config.lr / (1 - beta1**t), (1 - beta2**t) ** 0.5) for t in set(steps)}
    decay = 1 - config.lr * config.weight_decay
    decays = [True] * len(weights) if decayed is None else decayed
    each = [(*step_sizes[t], decay if d else 1.0) for t, d in zip(steps, decays, strict=True)]
    native.call(
        "adamw", len(weights), _sizes(weights), _addresses(weights), _addresses(grads),
        _addresses(exp_avgs), _addresses(exp_avg_sqs),
        None if averages is None else _addresses(averages),
        torch.tensor(each, dtype=torch.float32),
        1 - beta1, beta2, 1 - beta2, config.eps, config.ema_weight,
    )  # fmt: skip


def is_dense(tensor: Tensor) -> bool:
    """Return whether the elements fill one block of memory without gaps, in any dimension order."""
    return tensor.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(tensor)


def with_strides_of(weights: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
    """Return gradients with the strides of their weights, copying those that have others."""
    if list(map(_STRIDE, grads)) == list(map(_STRIDE, weights)):  # nearly always; cheap to check
        return list(grads)
    return [
        grad if grad.stride() == weight.stride() else torch.empty_like(weight).copy_(grad)
        for weight, grad in zip(weights, grads, strict=True)
    ]


def _check_dtypes(*tensors: Tensor) -> None:
    # In one pass, since it runs in every step.
    kinds = set(map(_KIND, tensors))
    if kinds - {(torch.float32, True)}:
        raise TypeError(f"expected tensors of float32 on the CPU, got {kinds}")


def _sizes(tensors: Sequence[Tensor]) -> Tensor:
    return torch.tensor([tensor.numel() for tensor in tensors], dtype=torch.int64)


def _addresses(tensors: Sequence[Tensor]) -> Tensor:
    return torch.tensor([tensor.data_ptr() for tensor in tensors], dtype=torch.int64)
