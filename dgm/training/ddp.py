"""A net with its optimizer, wrapped for training on one process or in DDP.

`WrappedNet` is the interface of all engines to the trainer; DeepSpeed's are in zero.py.
"""

from __future__ import annotations

import abc
import contextlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dgm.nn.kernels.adamw import gradient_norm
from dgm.training.optimizer import AdamW, EmaUpdate, OptimConfig, decayed_weights, with_gradient
from dgm.training.state_dicts import frozen_copy, in_channels_last, load_moments, moments_of

LossFunction = Callable[[], Tensor]
"""Runs the forward pass and returns the loss []."""
NormCheck = Callable[[Tensor], Tensor | None]
"""Checks a gradient norm []; returns 1.0 if the device has to skip the update, else 0.0 or None."""


class WrappedNet(abc.ABC):
    """A net with its optimizer, as an engine wraps them.

    The default methods are for replicated weights; engines that shard weights override them.
    """

    net: nn.Module
    optimizer: Any  # has `state`: moments by parameter

    @property
    @abc.abstractmethod
    def strategy(self) -> str:
        """Return which engine wraps the net: one process, DDP or a stage of ZeRO."""

    @abc.abstractmethod
    def forward(self, loss: LossFunction, sync: bool) -> Tensor:
        """Return the loss []; `sync` (last micro-batch): average the gradient over ranks."""

    @abc.abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Backpropagate a loss; its gradient is added to those of earlier micro-batches."""

    @abc.abstractmethod
    def clip_and_step(self, lr: float, check: NormCheck, ema: EmaUpdate | None = None) -> bool:
        """Clip the gradient, update the weights, clear the gradient.

        Return whether the moving average was updated in the same pass.
        """

    def full_weights(self, write: bool = False) -> contextlib.AbstractContextManager[nn.Module]:
        """Yield the net with unsharded weights, to read or to `write`. Collective."""
        return contextlib.nullcontext(self.net)

    def copy(self) -> nn.Module:
        """Return a frozen copy with unsharded weights. Collective."""
        return frozen_copy(self.net)

    def moments(self) -> dict[str, Tensor]:
        """Return the optimizer's unsharded moments by `<moment>.<parameter>`. Collective."""
        return moments_of(self.net, self.optimizer.state)

    @abc.abstractmethod
    def load_moments(self, moments: Mapping[str, Tensor]) -> None:
        """Load the optimizer's moments, after new weights were loaded."""


class LossModule(nn.Module):
    """The module that DDP and DeepSpeed wrap: its forward pass computes the whole loss.

    Both prepare for the backward pass when the forward pass returns. If they wrapped the net, they
    would do so too early where a loss calls it twice or takes a gradient, as a GAN's penalty does.
    """

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, loss: LossFunction) -> Tensor:
        """Return the loss, which calls the net."""
        return loss()


class DataParallelNet(WrappedNet):
    """A net on one process or in DDP."""

    def __init__(self, net: nn.Module, config: OptimConfig, kernels: bool = False):
        """Create the optimizer and wrap the net; `kernels`: use our own where supported."""
        self.net = in_channels_last(net)
        self.clip_norm = config.clip_norm
        self.optimizer = AdamW(net.parameters(), config, kernels, decayed_weights(net))
        is_distributed = dist.is_initialized() and dist.get_world_size() > 1
        self.ddp = _in_ddp(net) if is_distributed else None

    @property
    def strategy(self) -> str:
        """Return `DDP` or `one process`."""
        return "DDP" if self.ddp else "one process"

    def forward(self, loss: LossFunction, sync: bool) -> Tensor:
        """Return the loss []; `sync`: average the gradient over ranks."""
        if self.ddp is None:
            return loss()
        with contextlib.nullcontext() if sync else self.ddp.no_sync():
            return self.ddp(loss)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a loss."""
        loss.backward()

    def clip_and_step(self, lr: float, check: NormCheck, ema: EmaUpdate | None = None) -> bool:
        """Clip the gradient, update the weights, clear the gradient."""
        weights = with_gradient(self.optimizer.parameters)
        norm = clip(weights, self.clip_norm, self.optimizer.native)
        averaged = self.optimizer.step(lr, check(norm), ema)
        for weight in weights:
            weight.grad = None
        return averaged

    def load_moments(self, moments: Mapping[str, Tensor]) -> None:
        """Load the optimizer's moments."""
        load_moments(self.net, self.optimizer.load_moments, moments)


def _in_ddp(net: nn.Module) -> DistributedDataParallel:
    """Wrap a net in DDP with a fixed order of gradient summation."""
    with warnings.catch_warnings():
        # Newer versions rename the first setting; older ones do not know the new name.
        warnings.simplefilter("ignore", FutureWarning)
        # The buffers of our nets are equal on all processes (`dgm.gan.batch_norm`): broadcasting
        # them would only cost time.
        ddp = DistributedDataParallel(
            LossModule(net), broadcast_buffers=False, gradient_as_bucket_view=True
        )
    # After its first pass DDP rebuilds its buckets in the order in which gradients arrived. On more
    # than two processes that changes the rounding of sums, and a resumed run would differ from an
    # uninterrupted one. So do a first pass that changes nothing.
    ddp(lambda: sum((p.sum() * 0 for p in net.parameters()), torch.zeros(()))).backward()
    net.zero_grad()
    return ddp


def clip(parameters: Sequence[nn.Parameter], max_norm: float, kernels: bool = False) -> Tensor:
    """Scale gradients to at most `max_norm` (0: no limit); return the norm before, []."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = gradient_norm(grads) if kernels else nn.utils.get_total_norm(grads)
    # On a CPU reading the norm costs nothing, but scaling by 1 costs a pass through memory.
    is_below = kernels and float(norm) + 1e-6 <= max_norm
    if max_norm > 0 and not is_below:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm
