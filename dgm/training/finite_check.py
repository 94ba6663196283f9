"""Stop a run at the first gradient that is not finite, before the weights change."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dgm.common.errors import UserError
from dgm.objective import Batch, Nets, NonFiniteFinder, Objective
from dgm.rng import Draws
from dgm.training.engine import Engine
from dgm.training.sampler import BatchSampler

_NEVER = 2**63 - 1  # every gradient so far was finite


class FiniteCheck:
    """Check the norm of every gradient.

    On a CPU and in ZeRO-1 to 3 the host reads it at once. Otherwise, so that the host need not
    wait, the device records the index of the first gradient that is not finite and skips all
    updates from then on; `raise_if_found` reads it before anything is logged or saved. The
    index of a gradient is its step times the number of phases, plus its phase.
    """

    def __init__(self, engine: Engine, objective: Objective, batches: BatchSampler):
        self.engine, self.objective, self.batches = engine, objective, batches
        self.first_bad = torch.full((), _NEVER, dtype=torch.int64, device=engine.device)

    def check_norm(self, norm: Tensor, index: int | Tensor) -> Tensor | None:
        """Check a gradient norm []; return 1.0 if the device has to skip updates, else 0.0.

        If the host reads the norm, return None, or raise UserError if the norm is not finite.
        index: a number, or int64 [] on the device in a captured step.
        """
        finite = norm < math.inf  # false for NaN too
        if self.engine.norms_on_host:
            if not bool(finite):
                raise self._error(int(index))
            return None
        # In place, because a captured step always writes to the same memory. Indices only increase.
        first = self.first_bad
        torch.minimum(first, torch.where(finite, first, index), out=first)
        return (first != _NEVER).float()

    def raise_if_found(self) -> None:
        """Raise UserError where the device recorded a gradient that was not finite."""
        index = int(self.first_bad)
        if index != _NEVER:
            raise self._error(index)

    def _error(self, index: int) -> UserError:
        step, phase = divmod(index, len(self.objective.phases))
        images_seen = step * self.batches.global_batch
        # The weights have not changed since, so the same images show the layer.
        micro_batches = self.batches.micro_batches(images_seen, self.engine.device)
        nets = self.engine.copy_nets()
        layer = self.engine.first_value(
            next(filter(None, (self._find(nets, *given) for given in micro_batches)), None)
        )
        where = f"; the first layer that is not finite is {layer}" if layer else ""
        return UserError(
            f"the gradient of {self.objective.phases[phase].name} is not finite at step {step} "
            f"(after {images_seen} images){where}: lower optim.lr, or set optim.clip_norm; "
            "earlier checkpoints are intact"
        )

    def _find(self, nets: Nets, batch: Batch, draws: Draws) -> str | None:
        if not isinstance(self.objective, NonFiniteFinder):
            return None
        with torch.no_grad(), self.engine.autocast():
            return self.objective.find_non_finite(nets, batch, draws)
