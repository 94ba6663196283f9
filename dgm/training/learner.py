"""A net with its optimizer, as it learns: the verbs in which engines differ.

`Whole` is one process or DDP, where each process holds all of the net; zero.py has what DeepSpeed
spreads over the processes.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dgm.nn.kernels.adamw import gradient_norm
from dgm.training.optimizer import AdamW, Average, OptimConfig, decayed_weights, learnt
from dgm.training.state_dicts import frozen_copy, in_channels_last, load_moments, moments_of

See = Callable[[Tensor], Tensor | None]
"""Looks at the norm [] of a gradient; gives 1.0 where the device has to leave weights alone."""


class Learner(Protocol):
    """What the engine asks of a net that learns."""

    net: nn.Module

    @property
    def built(self) -> str:
        """Say what stands: one process, DDP or a stage of ZeRO."""
        ...

    def backward(self, loss: Callable[[], Tensor], last: bool) -> None:
        """Compute a loss and add its gradient; only the last of a step is averaged over ranks."""
        ...

    def update(self, lr: float, see: See, average: Average | None = None) -> bool:
        """Clip the gradient, update the weights at this learning rate, and clear it.

        Says whether the average took in the new weights on the way.
        """
        ...

    def whole(self, write: bool = False) -> contextlib.AbstractContextManager[nn.Module]:
        """Give the net with its whole weights, to read or to `write`; every process must ask."""
        ...

    def copy(self) -> nn.Module:
        """Copy the net with its whole weights, frozen; every process must ask."""
        ...

    def moments(self) -> dict[str, Tensor]:
        """Gather the optimizer's whole moments by `moment.parameter`; every process must ask."""
        ...

    def continue_from(self, moments: Mapping[str, Tensor]) -> None:
        """Go on from weights that were just written, and from these moments."""
        ...


class Step(nn.Module):
    """A net to DDP or DeepSpeed: its forward pass is the loss.

    They get ready for a gradient as the forward pass returns. Were that the net's own, a loss that
    calls it twice, or takes a gradient within, as for a GAN's penalty, would set them off early.
    """

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, loss: Callable[[], Tensor]) -> Tensor:
        """Compute the loss, which calls the net."""
        return loss()


class Whole:
    """A net of which each process holds all."""

    def __init__(self, net: nn.Module, config: OptimConfig, kernels: bool = False):
        """Make the optimizer and wrap the net; `kernels`: by kernels of our own, where some fit."""
        self.net = in_channels_last(net)
        self.clip_norm = config.clip_norm
        self.optimizer = AdamW(net.parameters(), config, kernels, decayed_weights(net))
        several = dist.is_initialized() and dist.get_world_size() > 1
        self.ddp = _in_ddp(net) if several else None

    @property
    def built(self) -> str:
        """Say what stands."""
        return "DDP" if self.ddp else "one process"

    def backward(self, loss: Callable[[], Tensor], last: bool) -> None:
        """Compute a loss and add its gradient; only the last of a step is averaged over ranks."""
        if self.ddp is None:
            loss().backward()
            return
        with contextlib.nullcontext() if last else self.ddp.no_sync():
            self.ddp(loss).backward()

    def update(self, lr: float, see: See, average: Average | None = None) -> bool:
        """Clip the gradient, update the weights at this learning rate, and clear it."""
        weights = learnt(self.optimizer.parameters)
        norm = clip(weights, self.clip_norm, self.optimizer.native)
        averaged = self.optimizer.step(lr, see(norm), average)
        for weight in weights:
            weight.grad = None
        return averaged

    def whole(self, write: bool = False) -> contextlib.AbstractContextManager[nn.Module]:
        """Give the net."""
        return contextlib.nullcontext(self.net)

    def copy(self) -> nn.Module:
        """Copy the net, frozen."""
        return frozen_copy(self.net)

    def moments(self) -> dict[str, Tensor]:
        """Give the optimizer's moments by `moment.parameter`."""
        return moments_of(self.net, self.optimizer.state)

    def continue_from(self, moments: Mapping[str, Tensor]) -> None:
        """Put moments back."""
        load_moments(self.net, self.optimizer.put, moments)


def _in_ddp(net: nn.Module) -> DistributedDataParallel:
    """Wrap a net in DDP, and settle for good in which order gradients are summed."""
    with warnings.catch_warnings():
        # The first setting is to get another name, which older versions do not know.
        warnings.simplefilter("ignore", FutureWarning)
        # Buffers (BatchNorm) follow each process's own batch; sending them takes time.
        ddp = DistributedDataParallel(
            Step(net), broadcast_buffers=False, gradient_as_bucket_view=True
        )
    # After its first pass DDP sorts gradients anew, by their arrival, and on more than two
    # processes that changes sums by rounding: a resumed run would differ from one that was not.
    # So a first pass without effect comes before all others; the last layer's gradient is first.
    ddp(lambda: sum((p.sum() * 0 for p in net.parameters()), torch.zeros(()))).backward()
    net.zero_grad()
    return ddp


def clip(parameters: Sequence[nn.Parameter], limit: float, kernels: bool = False) -> Tensor:
    """Scale gradients to the norm `limit` at most (0: any), and give the norm that they had, []."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = gradient_norm(grads) if kernels else nn.utils.get_total_norm(grads)
    # On a CPU a look costs nothing, and a factor of 1 a pass through memory.
    below = kernels and float(norm) + 1e-6 <= limit
    if limit > 0 and not below:
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm
