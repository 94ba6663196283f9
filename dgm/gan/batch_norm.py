"""BatchNorm over the batch of all processes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional


class BatchNorm(nn.Module):
    """Normalise the channels of [B, C, H, W] over batch and places (Ioffe and Szegedy 2015).

    The batch is that of all processes together, so that a run does not depend on their number:
    torch's BatchNorm2d sees each process's part alone, its SyncBatchNorm works on GPUs only.
    With `num_classes` each class has a scale and shift of its own (Dumoulin et al. 2017).
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
        """Normalise by this batch in training, else by what past ones left; labels [B]."""
        by_class = self.weight.ndim == 2
        weight, bias = (None, None) if by_class else (self.weight, self.bias)
        if self.training and dist.is_initialized() and dist.get_world_size() > 1:
            x = self._normalize_together(x)
            if weight is not None and bias is not None:
                x = x * weight[:, None, None] + bias[:, None, None]
        else:
            x = functional.batch_norm(
                x, self.running_mean, self.running_var, weight, bias,
                self.training, self.momentum, self.eps,
            )  # fmt: skip
        if not by_class:
            return x
        assert labels is not None, "a BatchNorm by class is told the classes"
        return x * self.weight[labels][:, :, None, None] + self.bias[labels][:, :, None, None]

    def _normalize_together(self, x: Tensor) -> Tensor:
        """Normalise by mean and variance over all processes, whose parts are equally large."""
        wide = x.float() if x.dtype == torch.bfloat16 else x
        var, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
        # In float64, for the difference below has no digits to lose.
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
        return x * scale.to(x)[:, None, None] - (mean * scale).to(x)[:, None, None]


class _SumOverProcesses(torch.autograd.Function):
    """Add up a tensor over processes; the gradient of every process's loss flows back to all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _SumOverProcesses.apply(grads[0])
