"""Stopping a run at the first gradient that is not finite, before it changes a weight."""

from __future__ import annotations

import torch
from torch import Tensor

from dgm.errors import UserError
from dgm.objective import Batch, Layered, Nets, Objective
from dgm.rng import Draws
from dgm.train.batches import Batches
from dgm.train.engine import Engine


class FiniteWatch:
    """Watch the norm of every gradient.

    On a CPU the host sees it at once, and under ZeRO. Else the host would have to wait for the
    number, so the device notes where it went wrong first and leaves all weights alone from then
    on; `check` finds the note before anything is logged or saved.
    """

    def __init__(self, engine: Engine, objective: Objective, batches: Batches, waits: bool):
        """Prepare; the host looks at every norm where it `waits`."""
        self.engine, self.objective, self.batches, self.waits = engine, objective, batches, waits
        self.first_bad = torch.full((), -1, dtype=torch.int64, device=engine.device)

    def see(self, norm: Tensor, step: int, phase: int) -> Tensor | None:
        """Take in the norm of a phase's gradient; give 1.0 where the device has to skip updates."""
        place = step * len(self.objective.phases) + phase
        bad = ~torch.isfinite(norm)
        if self.waits:
            if bool(bad):
                raise self._error(place)
            return None
        self.first_bad = torch.where(bad & (self.first_bad < 0), place, self.first_bad)
        return (self.first_bad >= 0).float()

    def check(self) -> None:
        """Raise UserError where the device noted a gradient that was not finite."""
        place = int(self.first_bad)
        if place >= 0:
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
        if not isinstance(self.objective, Layered):
            return None
        with torch.no_grad(), self.engine.autocast():
            return self.objective.find_non_finite(nets, batch, draws)
