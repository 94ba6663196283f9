"""One optimizer step of a phase: losses of its micro-batches, gradients, norm, update."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from dgm.objective import Batch, Objective, Phase
from dgm.rng import Draws
from dgm.training.engine import Engine
from dgm.training.finite_check import FiniteWatch
from dgm.training.optimizer import Average

MicroBatches = Iterable[tuple[Batch, Draws]]


@dataclass
class StepOutput:
    """Means over the micro-batches of a step: `values` is float64 [len(names)]."""

    names: tuple[str, ...]
    values: Tensor
    averaged: bool  # the optimizer's pass also updated the moving average


@dataclass
class TrainStep:
    """Take steps; the host waits for nothing of the device unless the watch does."""

    engine: Engine
    objective: Objective
    watch: FiniteWatch
    num_micro: int

    def take(
        self,
        phase: Phase,
        micro_batches: MicroBatches,
        lr: float,
        place: int | Tensor,
        average: Average | None = None,
    ) -> StepOutput:
        """Update the phase's net once; `place` is that of the gradient in the run."""
        engine, found, norms = self.engine, list[dict[str, Tensor]](), list[Tensor]()
        with engine.learning(phase.net) as nets:
            for batch, draws in micro_batches:

                def loss(batch: Batch = batch, draws: Draws = draws) -> Tensor:
                    with engine.autocast():
                        values = self.objective.loss(nets, batch, phase, draws)
                    found.append({name: value.detach() for name, value in values.items()})
                    total = values["loss"]
                    return total if self.num_micro == 1 else total / self.num_micro

                engine.backward(phase.net, loss, last=len(found) == self.num_micro - 1)

        def see(norm: Tensor) -> Tensor | None:
            norms.append(norm)
            return self.watch.see(norm, place)

        averaged = engine.update(phase.net, lr, see, average)
        rows = [torch.stack([*values.values(), *norms]).double() for values in found]
        mean = rows[0] if len(rows) == 1 else torch.stack(rows).mean(0)
        return StepOutput((*found[0], "grad_norm"), mean, averaged)
