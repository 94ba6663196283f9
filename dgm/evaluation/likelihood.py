"""Bits per dimension of stored images."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dgm.common.progress import advance, progress
from dgm.objective import Batch, ImportanceWeighted, Likelihood, Nets
from dgm.rng import Draws
from dgm.training.device_loader import Images
from dgm.training.engine import Engine


def load_batch(data: Images, index: Tensor, device: torch.device) -> Batch:
    """Return the images of a data set at `index` [B] on a device."""
    rows = index.numpy()
    return Batch(
        torch.from_numpy(data.images(rows)).to(device),
        torch.from_numpy(data.labels(rows)).to(device),
    )


@dataclass(frozen=True)
class ImageSubset:
    """Images of a data set to evaluate, divided among the engine's processes."""

    engine: Engine
    data: Images
    index: Tensor  # int64 [N]: rows of the images
    seed: int  # image i has the draws of (seed, i)
    batch: int = 100

    @torch.no_grad()
    def map(self, fn: Callable[[Batch, Draws], Tensor]) -> Tensor:
        """Return `fn` of the images, float64 [N, ...] on the CPU. Collective: call on all ranks."""
        device = self.engine.device

        def compute(rows: Tensor) -> Tensor:
            parts = []
            for own in self.index[rows].split(self.batch):
                draws = Draws.of(self.seed, own.to(device))
                parts.append(fn(load_batch(self.data, own, device), draws).double())
                advance(len(own))
            return torch.cat(parts)

        with progress("evaluating test images", len(self.index)):
            return self.engine.map_rows(len(self.index), compute).cpu()


def bits_per_dim(
    objective: Likelihood, nets: Nets, images: ImageSubset, importance_samples: int = 0
) -> dict[str, float]:
    """Return bits per dimension, nats / (D ln 2), averaged over images.

    Keys: `exact` or `bound` is the total, `error` its standard error over images, and each term has
    its own name. With `importance_samples`, families that have the tighter importance-weighted
    bound also return it as `importance_weighted`. Collective: call on all ranks.
    """
    names: list[str] = []

    def terms(batch: Batch, draws: Draws) -> Tensor:
        nats = objective.nats(nets, batch, draws)
        if importance_samples:
            assert isinstance(objective, ImportanceWeighted), "checked by the caller"
            tighter = objective.importance_weighted_nats(nets, batch, draws, importance_samples)
            nats = {**nats, "importance_weighted": tighter}
        names[:] = nats
        return torch.stack(list(nats.values()), dim=1).double() * bits_per_nat(batch)

    bits = images.map(terms)
    total = bits[:, [name != "importance_weighted" for name in names]].sum(1)
    return {
        "exact" if objective.exact else "bound": float(total.mean()),
        "error": standard_error(total),
        **dict(zip(names, bits.mean(0).tolist(), strict=True)),
    }


def bits_per_nat(batch: Batch) -> float:
    """Return the factor from nats of an image to bits per dimension: 1 / (D ln 2)."""
    return 1 / (batch.images[0].numel() * math.log(2))


def standard_error(values: Tensor) -> float:
    """Return the standard error of the mean of [N]; NaN for one value."""
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan
