"""Bits per dimension of stored images."""

from __future__ import annotations

import math
from collections.abc import Callable

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


@torch.no_grad()
def map_images(
    engine: Engine,
    data: Images,
    index: Tensor,
    seed: int,
    fn: Callable[[Batch, Draws], Tensor],
    batch: int = 100,
) -> Tensor:
    """Return `fn` of the images at `index` [N], each process a part: float64 [N, ...] on the CPU.

    Image i has the draws of (seed, i). Collective: call on all ranks.
    """

    def compute(rows: Tensor) -> Tensor:
        parts = []
        for own in index[rows].split(batch):
            draws = Draws.of(seed, own.to(engine.device))
            parts.append(fn(load_batch(data, own, engine.device), draws).double())
            advance(len(own))
        return torch.cat(parts)

    with progress("evaluating test images", len(index)):
        return engine.spread(len(index), compute).cpu()


def bits_per_dim(
    engine: Engine,
    objective: Likelihood,
    nets: Nets,
    data: Images,
    index: Tensor,
    seed: int,
    batch: int = 100,
    importance_samples: int = 0,
) -> dict[str, float]:
    """Return bits per dimension, nats / (D ln 2), averaged over the images at `index` [N].

    The total is `exact` or `bound`, its standard error over images `error`, and each term has its
    own name; with `importance_samples` the tighter bound of a family that has one is
    `importance_weighted`. Collective: call on all ranks.
    """
    names: list[str] = []

    def terms(images: Batch, draws: Draws) -> Tensor:
        nats = objective.nats(nets, images, draws)
        if importance_samples:
            assert isinstance(objective, ImportanceWeighted), "checked by the caller"
            tighter = objective.importance_weighted_nats(nets, images, draws, importance_samples)
            nats = {**nats, "importance_weighted": tighter}
        names[:] = nats
        return torch.stack(list(nats.values()), dim=1).double() * bits_per_nat(images)

    bits = map_images(engine, data, index, seed, terms, batch)
    total = bits[:, [name != "importance_weighted" for name in names]].sum(1)
    return {
        "exact" if objective.exact else "bound": float(total.mean()),
        "error": standard_error(total),
        **dict(zip(names, bits.mean(0).tolist(), strict=True)),
    }


def bits_per_nat(images: Batch) -> float:
    """Return the factor from nats of an image to bits per dimension: 1 / (D ln 2)."""
    return 1 / (images.images[0].numel() * math.log(2))


def standard_error(values: Tensor) -> float:
    """Return the standard error of the mean of [N]; not a number for one value."""
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan
