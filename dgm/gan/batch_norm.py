"""BatchNorm over the batch of all processes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from dgm.nn.embedding import embed


class BatchNorm(nn.Module):
    """Normalise the channels of [B, C, H, W] over batch and places (Ioffe and Szegedy 2015).

    The batch is that of all processes together, so that a run does not depend on their number:
    torch's BatchNorm2d sees each process's part alone, its SyncBatchNorm works on GPUs only.
    With `num_classes` each class has a scale and shift of its own (Dumoulin et al. 2017).
    With several processes a forward pass in training is collective: call on all ranks.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, num_classes: int | None = None, momentum: float = 0.1):
        """Start as the plain normalisation; `momentum` is the share of the newest batch."""
        super().__init__()
        self.momentum, self.eps = momentum, 1e-5
        shape = (channels,) if num_classes is None else (num_classes, channels)
        self.weight, self.bias = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.zeros(shape))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Normalise by this batch's statistics in training, else by the running ones; labels [B].

        The output has the input's dtype. Half-precision inputs are normalised, scaled and shifted
        in float32 and rounded once, as torch's own kernels do.
        """
        weight: Tensor = self.weight
        bias: Tensor = self.bias
        by_class = weight.ndim == 2
        together = self.training and dist.is_initialized() and dist.get_world_size() > 1
        if not (by_class or together):
            return self._normalize_alone(x, weight, bias)
        if by_class:
            assert labels is not None, "a class-conditional BatchNorm needs labels"
            weight, bias = embed(labels, weight), embed(labels, bias)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        y = self._normalize_together(wide) if together else self._normalize_alone(wide)
        return (y * weight[..., None, None] + bias[..., None, None]).to(x.dtype)

    def _normalize_alone(
        self, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        return functional.batch_norm(
            x, self.running_mean, self.running_var, weight, bias,
            self.training, self.momentum, self.eps,
        )  # fmt: skip

    def _normalize_together(self, x: Tensor) -> Tensor:
        """Normalise fp32 or fp64 x by mean and variance over all ranks (equal batch sizes)."""
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        # In float64: E[x^2] - E[x]^2 below cancels in float32.
        moments = torch.stack([mean.double(), var.double() + mean.double().square()])
        processes = dist.get_world_size()
        mean, square = _SumOverProcesses.apply(moments).div(processes).unbind()
        var = square - mean.square()
        count = x.numel() // x.shape[1] * processes
        with torch.no_grad():
            self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
            unbiased = var * (count / (count - 1))
            self.running_var.lerp_(unbiased.to(self.running_var), self.momentum)
        scale = torch.rsqrt(var + self.eps)
        return (x - mean.to(x)[:, None, None]) * scale.to(x)[:, None, None]


class _SumOverProcesses(torch.autograd.Function):
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
        return _SumOverProcesses.apply(grads[0])

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return _SumOverProcesses.apply(tangents[0])
