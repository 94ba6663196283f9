"""What a family gives to the loop: phases, a loss, and a way to sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from dgm.rng import Draws


@dataclass(frozen=True)
class Phase:
    """One kind of update: which net learns, and every how many steps."""

    name: str
    net: str
    every: int = 1


@dataclass(frozen=True)
class Batch:
    """Stored images of a micro-batch, on the device."""

    images: Tensor  # uint8 [B, H, W, C]
    labels: Tensor  # int64 [B]


class Objective(Protocol):
    """A family, seen from the loop; it receives nets, so it cannot tell an engine from another."""

    @property
    def phases(self) -> tuple[Phase, ...]:
        """Give the updates of one step, in order."""
        ...

    def loss(
        self, nets: Mapping[str, nn.Module], batch: Batch, phase: Phase, draws: Draws
    ) -> dict[str, Tensor]:
        """Compute means over the micro-batch, []; "loss" has the gradient, the rest is logged."""
        ...

    def sample(
        self,
        nets: Mapping[str, nn.Module],
        count: int,
        labels: Tensor | None,
        draws: Draws,
        **knobs: Any,
    ) -> Tensor:
        """Make images, [count, C, H, W] in [-1, 1]; image i by the draws of index i.

        `knobs` replace entries of the configuration's `sample` section.
        """
        ...
