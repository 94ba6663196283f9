"""The moving average of the weights, which is what one samples from."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dgm.training.optimizer import Average
from dgm.training.state_dicts import copies


class Ema:
    """Average weights over images seen, in the precision of the weights."""

    def __init__(self, nets: Mapping[str, nn.Module], halflife_images: float, rampup: float = 0.05):
        """Start at the nets' weights.

        A weight counts half after `halflife_images` more images, early in a run after the share
        `rampup` of the images seen, where that is less (Karras et al. 2024, section 3).
        """
        self.nets = copies(nets)
        # Walking through a net's modules for them takes most of a millisecond, at every step.
        self._own: dict[str, list[Tensor]] = {
            name: list(net.parameters()) for name, net in self.nets.items()
        }
        self._buffers = {name: list(net.buffers()) for name, net in self.nets.items()}
        self._theirs: dict[str, tuple[nn.Module, list[Tensor]]] = {}
        self.halflife_images, self.rampup = halflife_images, rampup

    def share(self, images_seen: int, batch: int) -> float:
        """Say what share of the weights it takes in after a step that ended at `images_seen`."""
        halflife = min(self.halflife_images, images_seen * self.rampup)
        return 1 - 0.5 ** (batch / halflife) if halflife > 0 else 1.0

    def along(self, name: str, images_seen: int, batch: int) -> Average | None:
        """Give a net's average to what updates its weights; None where it has none."""
        if name not in self.nets:
            return None
        return Average(self._own[name], self.share(images_seen, batch))

    @torch.no_grad()
    def update(
        self,
        nets: Mapping[str, nn.Module],
        images_seen: int,
        batch: int,
        along: Mapping[str, bool] | None = None,
    ) -> None:
        """Take in the weights after a step of `batch` images that ended at `images_seen`.

        Those of the nets `along` are in it already, where it says so.
        """
        share = self.share(images_seen, batch)
        for name in self.nets:
            net = nets[name]
            if not (along or {}).get(name):
                torch._foreach_lerp_(self._own[name], self._weights(name, net), share)
            if not self._buffers[name]:
                continue
            # Statistics of a BatchNorm belong to the weights, so they are averaged alike.
            pairs = list(zip(self._buffers[name], net.buffers(), strict=True))
            averaged = [pair for pair in pairs if pair[1].is_floating_point()]
            if averaged:
                torch._foreach_lerp_([a for a, _ in averaged], [b for _, b in averaged], share)
            for average, buffer in pairs:
                if not buffer.is_floating_point():
                    average.copy_(buffer)

    def _weights(self, name: str, net: nn.Module) -> list[Tensor]:
        known, weights = self._theirs.get(name, (None, []))
        if known is not net:
            weights = list(net.parameters())
            self._theirs[name] = net, weights
        return weights
