"""Batch normalization over the global batch of all processes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from dgm.nn.layers import embed

_MOMENTUM = 0.1  # weight of a batch in the running averages
_EPS = 1e-5


class BatchNorm(nn.Module):
    """Normalize the channels of [B, C, H, W] over batch and positions (Ioffe and Szegedy 2015).

    Statistics are those of the global batch, so a run does not depend on the number of processes:
    torch's BatchNorm2d uses each process's part, its SyncBatchNorm works on GPUs only. With
    `num_classes` scale and shift are conditional on the class (Dumoulin et al. 2017).
    With several processes a forward pass in training is collective: call on all ranks.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, num_classes: int | None = None):
        """Initialize all scales to 1 and shifts to 0."""
        super().__init__()
        shape = (channels,) if num_classes is None else (num_classes, channels)
        self.weight, self.bias = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.zeros(shape))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Normalize by this batch's statistics in training, else by the running ones; labels [B].

        The output has the input's dtype. Half-precision inputs are normalized, scaled and shifted
        in float32 and rounded once, as torch's own kernels do.
        """
        weight: Tensor = self.weight
        bias: Tensor = self.bias
        conditional = weight.ndim == 2
        synced = self.training and dist.is_initialized() and dist.get_world_size() > 1
        if not (conditional or synced):
            return self._normalize_local(x, weight, bias)
        if conditional:
            assert labels is not None, "a class-conditional BatchNorm needs labels"
            weight, bias = embed(labels, weight), embed(labels, bias)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        y = self._normalize_synced(wide) if synced else self._normalize_local(wide)
        return (y * weight[..., None, None] + bias[..., None, None]).to(x.dtype)

    def _normalize_local(
        self, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        return functional.batch_norm(
            x, self.running_mean, self.running_var, weight, bias,
            self.training, _MOMENTUM, _EPS,
        )  # fmt: skip

    def _normalize_synced(self, x: Tensor) -> Tensor:
        """Normalize fp32 or fp64 x by mean and variance over all ranks (equal batch sizes)."""
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        # In float64: E[x^2] - E[x]^2 below cancels in float32.
        moments = torch.stack([mean.double(), var.double() + mean.double().square()])
        processes = dist.get_world_size()
        mean, square = _AllReduceSum.apply(moments).div(processes).unbind()
        var = square - mean.square()
        count = x.numel() // x.shape[1] * processes
        with torch.no_grad():
            self.running_mean.lerp_(mean.to(self.running_mean), _MOMENTUM)
            unbiased = var * (count / (count - 1))
            self.running_var.lerp_(unbiased.to(self.running_var), _MOMENTUM)
        scale = torch.rsqrt(var + _EPS)
        return (x - mean.to(x)[:, None, None]) * scale.to(x)[:, None, None]


class _AllReduceSum(torch.autograd.Function):
    """Sum a tensor over processes. Collective: call on all ranks, in backward and jvp too.

    The result of each rank depends on the inputs of all. So the gradient of an input is the sum of
    the gradients of all ranks' results, and the tangent of a result the sum of all ranks' tangents:
    backward and jvp are the same sum, through this function again, which makes higher derivatives
    work.
    """

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _AllReduceSum.apply(grads[0])

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return _AllReduceSum.apply(tangents[0])
