"""The exponential moving average of the weights, from which samples are drawn."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dgm.training.optimizer import EmaUpdate
from dgm.training.state_dicts import frozen_copy


class Ema:
    """Average weights over images seen, in the precision of the weights."""

    rampup = 0.05  # half-life early in a run, as a fraction of the images seen

    def __init__(self, nets: Mapping[str, nn.Module], halflife_images: float):
        """Start at the nets' weights.

        A weight's contribution halves after `halflife_images` more images, or after the fraction
        `rampup` of the images seen while that is less (as in the code of Karras et al. 2022, EDM).
        """
        self.nets = {name: frozen_copy(net) for name, net in nets.items()}
        # Listing a net's parameters takes most of a millisecond, at every step.
        self._averages: dict[str, list[Tensor]] = {
            name: list(net.parameters()) for name, net in self.nets.items()
        }
        self._buffers = {name: list(net.buffers()) for name, net in self.nets.items()}
        self._sources: dict[str, tuple[nn.Module, list[Tensor]]] = {}
        self.halflife_images = halflife_images

    def lerp_weight(self, images_seen: int, batch: int) -> float:
        """Return 1 - decay of the update after a step that ended at `images_seen`."""
        halflife = min(self.halflife_images, images_seen * self.rampup)
        return 1 - 0.5 ** (batch / halflife) if halflife > 0 else 1.0

    def fused_update(self, name: str, images_seen: int, batch: int) -> EmaUpdate | None:
        """Return the update of a net's average, for the optimizer to fuse; None if not kept."""
        if name not in self.nets:
            return None
        return EmaUpdate(self._averages[name], self.lerp_weight(images_seen, batch))

    @torch.no_grad()
    def update(
        self,
        nets: Mapping[str, nn.Module],
        images_seen: int,
        batch: int,
        averaged: Mapping[str, bool] | None = None,
    ) -> None:
        """Update the averages after a step of `batch` images that ended at `images_seen`.

        averaged: by net, whether the optimizer has updated the averages of its parameters already.
        """
        weight = self.lerp_weight(images_seen, batch)
        for name in self.nets:
            net = nets[name]
            if not (averaged or {}).get(name):
                torch._foreach_lerp_(self._averages[name], self._weights(name, net), weight)
            # A BatchNorm's statistics belong to the weights, so they are averaged alike.
            pairs = list(zip(self._buffers[name], net.buffers(), strict=True))
            if floating := [pair for pair in pairs if pair[1].is_floating_point()]:
                torch._foreach_lerp_([a for a, _ in floating], [b for _, b in floating], weight)
            for average, buffer in pairs:
                if not buffer.is_floating_point():
                    average.copy_(buffer)

    def _weights(self, name: str, net: nn.Module) -> list[Tensor]:
        known, weights = self._sources.get(name, (None, []))
        if known is not net:
            weights = list(net.parameters())
            self._sources[name] = net, weights
        return weights
