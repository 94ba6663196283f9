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


@torch.no_grad()
def over_images(
    engine: Engine,
    data: Images,
    index: Tensor,
    seed: int,
    of: Callable[[Batch, Draws], Tensor],
    batch: int = 100,
) -> Tensor:
    """Compute `of` images [N] of a data set, each process a part: [N, ...] float64, on the CPU.

    Image i has the draws of (seed, i). All processes must ask.
    """

    def measure(rows: Tensor) -> Tensor:
        parts = []
        for own in index[rows].split(batch):
            given = Batch(
                torch.from_numpy(data.images(own.numpy())).to(engine.device),
                torch.from_numpy(data.labels(own.numpy())).to(engine.device),
            )
            parts.append(of(given, Draws.of(seed, own.to(engine.device))).double())
            advance(len(own))
        return torch.cat(parts)

    with progress("measuring test images", len(index)):
        return engine.map_rows(len(index), measure).cpu()


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
    """Measure images [N] of a data set, each process a part: nats / (D ln 2), on average.

    Gives the whole under `exact` or `bound`, its standard error over images under `error`, and
    each of its terms under its own name; with `importance_samples` the closer bound of a family
    that has one, as `importance_weighted`. All processes must ask.
    """
    names: list[str] = []

    def terms(given: Batch, draws: Draws) -> Tensor:
        nats = objective.nats(nets, given, draws)
        if importance_samples:
            assert isinstance(objective, ImportanceWeighted), "the caller has asked"
            closer = objective.importance_weighted_nats(nets, given, draws, importance_samples)
            nats = {**nats, "importance_weighted": closer}
        names[:] = nats
        return torch.stack(list(nats.values()), dim=1).double() * as_bits(given)

    found = over_images(engine, data, index, seed, terms, batch)
    whole = found[:, [name != "importance_weighted" for name in names]].sum(1)
    return {
        "exact" if objective.exact else "bound": float(whole.mean()),
        "error": standard_error(whole),
        **dict(zip(names, found.mean(0).tolist(), strict=True)),
    }


def as_bits(given: Batch) -> float:
    """Give what turns nats of an image into bits per dimension: 1 / (D ln 2)."""
    return 1 / (given.images[0].numel() * math.log(2))


def standard_error(values: Tensor) -> float:
    """Estimate how far the mean of [N] may lie off; not a number for one value."""
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan
