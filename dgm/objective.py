"""The interface of a model family to the training loop and the scripts.

Every family implements `Objective`. The other protocols are optional; callers use isinstance.
"""

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
    """One kind of update: which network it updates, and once in how many steps."""

    name: str
    net: str
    every: int = 1
    average: bool = True  # keep a moving average (EMA) of the network


@dataclass(frozen=True)
class Batch:
    """Stored images of a micro-batch, on the device."""

    images: Tensor  # uint8 [B, H, W, C]
    labels: Tensor  # int64 [B]
    images_seen: int | Tensor = 0  # before this step; int64 [] in a CUDA graph
    step: int = 0  # training steps before this one; see `StepDependent`


class Objective(Protocol):
    """A family's loss and sampling; it receives networks, so it is independent of the engine."""

    @property
    def phases(self) -> tuple[Phase, ...]:
        """Return the updates of one step, in order."""

    @property
    def num_classes(self) -> int | None:
        """Return the number of classes; None if the networks are unconditional."""

    @property
    def sample_config(self) -> Any:
        """Return the dataclass whose fields are the options of `sample`."""

    @property
    def pixels(self) -> PixelMap:
        """Return the map between stored grey levels and the networks' images.

        `pixels.to_uint8` converts what `sample` returns into stored images.
        """

    def loss(self, nets: Nets, batch: Batch, phase: Phase, draws: Draws) -> dict[str, Tensor]:
        """Return named means over the micro-batch, []; "loss" is minimized, all are logged."""

    def sample(
        self, nets: Nets, count: int, labels: Tensor | None, draws: Draws, **knobs: Any
    ) -> Tensor:
        """Return images [count, C, H, W], as mapped by `pixels`; image i uses row i of `draws`.

        `knobs` replace fields of `sample_config`.
        """


@runtime_checkable
class Likelihood(Protocol):
    """A family with a likelihood, exact or a bound."""

    exact: bool  # exact for dequantized images; False: a bound

    def nats(self, nets: Nets, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """Return named terms, each [B], whose sum is -log p of stored images or an upper bound.

        p is the probability mass of the grey levels.
        """


@runtime_checkable
class ImportanceWeighted(Likelihood, Protocol):
    """A family with an importance-weighted bound."""

    def importance_weighted_nats(
        self, nets: Nets, batch: Batch, draws: Draws, num_samples: int
    ) -> Tensor:
        """Return an upper bound on -log p of stored images from `num_samples` samples, nats [B]."""


@runtime_checkable
class LatentDecoder(Protocol):
    """A family whose images are functions of a latent z [D] and the class."""

    def latents(self, draws: Draws) -> Tensor:
        """Draw latents from the prior N(0, I), [B, D]."""

    def decode(self, nets: Nets, z: Tensor, labels: Tensor | None) -> Tensor:
        """Return images of latents, [B, C, H, W] in [-1, 1]; differentiable."""


@runtime_checkable
class LatentEncoder(LatentDecoder, Protocol):
    """A family that can also invert `decode`, at least approximately."""

    def encode(self, nets: Nets, batch: Batch, draws: Draws) -> Tensor:
        """Return latents [B, D] that `decode` maps to these images or close to them."""


@runtime_checkable
class Visualizable(Protocol):
    """A family with visualizations besides samples."""

    def visualize(self, nets: Nets, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """Return image grids by name, each [rows, columns, C, H, W] in [-1, 1]."""


@runtime_checkable
class InitializedByData(Protocol):
    """A family with data-dependent initialization."""

    def initialize(self, nets: Nets, batch: Batch, draws: Draws) -> None:
        """Initialize weights from a batch that is the same on every process."""


@runtime_checkable
class NonFiniteFinder(Protocol):
    """A family that can locate the layer where values stop being finite."""

    def find_non_finite(self, nets: Nets, batch: Batch, draws: Draws) -> str | None:
        """Return the first layer whose output for these images is not finite; None if all are."""


@runtime_checkable
class StepDependent(Protocol):
    """A family whose loss depends on `Batch.step`.

    A CUDA graph repeats the step that it was captured from, so there is one graph per variant.
    """

    def variant(self, phase: Phase, step: int) -> Hashable:
        """Return a key of the step's computation; steps with equal keys share a CUDA graph."""


@runtime_checkable
class WholeBatch(Protocol):
    """A family in which the loss of an image depends on the rest of its batch."""

    whole_batch: bool  # True: gradient accumulation would change the result
