"""What a family gives to the loop: phases, a loss, a way to sample, and whatever else it can do."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from dgm.preprocessing import PixelMap
from dgm.rng import Draws

Nets = Mapping[str, nn.Module]


@dataclass(frozen=True)
class Phase:
    """One kind of update: which net learns, and every how many steps."""

    name: str
    net: str
    every: int = 1
    average: bool = True  # keep a moving average of the net


@dataclass(frozen=True)
class Batch:
    """Stored images of a micro-batch, on the device."""

    images: Tensor  # uint8 [B, H, W, C]
    labels: Tensor  # int64 [B]
    images_seen: int | Tensor = 0  # by the run before this step; int64 [] in a recorded step
    step: int = 0  # training steps completed before this one; see `Varying`


class Objective(Protocol):
    """A family, seen from the loop; it receives nets, so it cannot tell an engine from another."""

    @property
    def phases(self) -> tuple[Phase, ...]:
        """Give the updates of one step, in order."""
        ...

    @property
    def num_classes(self) -> int | None:
        """Count the classes that the nets are told; None where they are told none."""
        ...

    @property
    def sample_config(self) -> Any:
        """Give the dataclass whose fields are the knobs of `sample`."""
        ...

    @property
    def pixels(self) -> PixelMap:
        """Return the map between stored grey levels and the images that the nets work on.

        `pixels.to_uint8` converts what `sample` returns into stored images.
        """
        ...

    def loss(self, nets: Nets, batch: Batch, phase: Phase, draws: Draws) -> dict[str, Tensor]:
        """Compute means over the micro-batch, []; "loss" has the gradient, the rest is logged."""
        ...

    def sample(
        self, nets: Nets, count: int, labels: Tensor | None, draws: Draws, **knobs: Any
    ) -> Tensor:
        """Make images, [count, C, H, W] of the map `pixels`; image i by the draws of index i.

        `knobs` replace entries of the configuration's `sample` section.
        """
        ...


# What only some families can do; the loop and the scripts ask with isinstance.


@runtime_checkable
class Likelihood(Protocol):
    """A family that knows how probable an image is, or a bound of it."""

    exact: bool  # the density of dequantised images is computed exactly, not bounded

    def nats(self, nets: Nets, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """Compute the terms of -log p of stored images (the mass of their grey levels), each [B].

        Their sum is -log p, or bounds it from above.
        """
        ...


@runtime_checkable
class ImportanceWeighted(Likelihood, Protocol):
    """A family whose bound comes closer with more samples."""

    def importance_weighted_nats(
        self, nets: Nets, batch: Batch, draws: Draws, num_samples: int
    ) -> Tensor:
        """Bound -log p of stored images from above by `num_samples` samples, [B]."""
        ...


@runtime_checkable
class Latent(Protocol):
    """A family that makes each image of a latent z [D] and of nothing else but its class."""

    def latents(self, draws: Draws) -> Tensor:
        """Draw latents of the prior, N(0, 1) in each dimension: [B, D]."""
        ...

    def decode(self, nets: Nets, z: Tensor, labels: Tensor | None) -> Tensor:
        """Make images of latents, [B, C, H, W] in [-1, 1]; with a gradient where one is asked."""
        ...


@runtime_checkable
class Encoder(Latent, Protocol):
    """A family that finds the latent of an image."""

    def encode(self, nets: Nets, batch: Batch, draws: Draws) -> Tensor:
        """Find latents [B, D] of which `decode` makes these images, or what comes near them."""
        ...


@runtime_checkable
class Pictured(Protocol):
    """A family with more to look at than samples."""

    def pictures(self, nets: Nets, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """Draw sheets by name, each [rows, columns, C, H, W] in [-1, 1]."""
        ...


@runtime_checkable
class InitializedByData(Protocol):
    """A family whose first weights depend on images."""

    def initialize(self, nets: Nets, batch: Batch, draws: Draws) -> None:
        """Set weights from a batch, which is the same on every process."""
        ...


@runtime_checkable
class Layered(Protocol):
    """A family that can say which layer broke."""

    def find_non_finite(self, nets: Nets, batch: Batch, draws: Draws) -> str | None:
        """Name the first layer whose output for these images is not finite."""
        ...


@runtime_checkable
class Varying(Protocol):
    """A family whose loss does other work in some steps than in others.

    A step that is recorded as a CUDA graph repeats the work of the step that it was recorded in, so
    a loss that reads `Batch.step` has to say here what follows from it.
    """

    def variant(self, phase: Phase, step: int) -> Hashable:
        """Return a key of the work done in this step: steps with equal keys do the same work."""
        ...


@runtime_checkable
class WholeBatch(Protocol):
    """A family in which the loss of an image depends on the others of its batch."""

    whole_batch: bool  # so that accumulating micro-batches would be another run
