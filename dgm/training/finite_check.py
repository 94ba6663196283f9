"""Stopping a run at the first gradient that is not finite, before it changes a weight."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dgm.common.errors import UserError
from dgm.objective import Batch, Nets, NonFiniteFinder, Objective
from dgm.rng import Draws
from dgm.training.engine import Engine
from dgm.training.sampler import Batches

_NOWHERE = 2**63 - 1  # as far as the device has seen, every gradient was finite


class FiniteWatch:
    """Watch the norm of every gradient.

    On a CPU the host sees it at once, and under ZeRO. Else the host would have to wait for the
    number, so the device notes where it went wrong first and leaves all weights alone from then
    on; `check` finds the note before anything is logged or saved. The place of a gradient in the
    run is its step times the number of phases, plus its phase.
    """

    def __init__(self, engine: Engine, objective: Objective, batches: Batches, waits: bool):
        """Prepare; the host looks at every norm where it `waits`."""
        self.engine, self.objective, self.batches, self.waits = engine, objective, batches, waits
        self.first_bad = torch.full((), _NOWHERE, dtype=torch.int64, device=engine.device)

    def see(self, norm: Tensor, place: int | Tensor) -> Tensor | None:
        """Record the norm of a gradient; return 1.0 if the device has to skip updates, else 0.0.

        place: a number, or int64 [] on the device in a recorded step.
        """
        finite = norm < math.inf  # which is false for NaN too
        if self.waits:
            if not bool(finite):
                raise self._error(int(place))
            return None
        # In place, as a recorded step writes to the same memory each time; places only grow.
        first = self.first_bad
        torch.minimum(first, torch.where(finite, first, place), out=first)
        return (first != _NOWHERE).float()

    def check(self) -> None:
        """Raise UserError where the device noted a gradient that was not finite."""
        place = int(self.first_bad)
        if place != _NOWHERE:
            raise self._error(place)

    def _error(self, place: int) -> UserError:
        step, phase = divmod(place, len(self.objective.phases))
        images_seen = step * self.batches.global_batch
        # The weights are still those that failed, so the same images show the layer.
        micro_batches = self.batches.step(images_seen, self.engine.device)
        nets = self.engine.copies()
        broken = self.engine.first_said(
            next(filter(None, (self._find(nets, *given) for given in micro_batches)), None)
        )
        where = f"; the first layer that is not finite is {broken}" if broken else ""
        return UserError(
            f"the gradient of {self.objective.phases[phase].name} is not finite at step {step} "
            f"(after {images_seen} images){where}: lower optim.lr, or set optim.clip_norm; "
            "the checkpoints before it are whole"
        )

    def _find(self, nets: Nets, batch: Batch, draws: Draws) -> str | None:
        if not isinstance(self.objective, NonFiniteFinder):
            return None
        with torch.no_grad(), self.engine.autocast():
            return self.objective.find_non_finite(nets, batch, draws)
