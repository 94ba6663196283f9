"""Bits per dimension of stored images."""

from __future__ import annotations

import math

import torch

from dgm.objective import Batch, ImportanceWeighted, Likelihood, Nets
from dgm.rng import Draws
from dgm.train.engine import Engine
from dgm.train.feed import Images


@torch.no_grad()
def bits_per_dim(
    engine: Engine,
    objective: Likelihood,
    nets: Nets,
    data: Images,
    index: torch.Tensor,
    seed: int,
    batch: int = 100,
    importance_samples: int = 0,
) -> dict[str, float]:
    """Measure images [N] of a data set, each process a part: nats / (D ln 2), on average.

    Gives the whole under `exact` or `bound`, its standard error over images under `error`, and
    each of its terms under its own name; with `importance_samples` the closer bound of a family
    that has one, as `importance_weighted`. All processes must ask.
    """
    # Equal parts for all; weight 0 for what the last process has to repeat.
    each = -(-len(index) // engine.world_size)
    own = torch.arange(engine.rank * each, (engine.rank + 1) * each)
    weight = (own < len(index)).double()
    own = index[own.clamp(max=len(index) - 1)]
    parts = []
    for rows in own.split(batch):
        given = Batch(
            torch.from_numpy(data.images(rows.numpy())).to(engine.device),
            torch.from_numpy(data.labels(rows.numpy())).to(engine.device),
        )
        draws = Draws.of(seed, rows.to(engine.device))
        nats = objective.nats(nets, given, draws)
        if importance_samples:
            assert isinstance(objective, ImportanceWeighted), "the caller has asked"
            closer = objective.importance_weighted_nats(nets, given, draws, importance_samples)
            nats = {**nats, "importance_weighted": closer}
        dimensions = given.images[0].numel()
        parts.append({k: v.double() / (dimensions * math.log(2)) for k, v in nats.items()})
    names = list(parts[0])
    terms = torch.stack([torch.cat([part[name] for part in parts]) for name in names], dim=1)
    found = engine.gather(torch.cat([terms, weight.to(terms)[:, None]], dim=1)).cpu()
    found = found[found[:, -1] > 0, :-1]
    whole = found[:, [name != "importance_weighted" for name in names]].sum(1)
    error = float(whole.std() / math.sqrt(len(whole))) if len(whole) > 1 else math.nan
    return {
        "exact" if objective.exact else "bound": float(whole.mean()),
        "error": error,
        **dict(zip(names, found.mean(0).tolist(), strict=True)),
    }
