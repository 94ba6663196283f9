"""Sampling spread over the processes of an engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dgm.objective import Objective
from dgm.rng import Draws
from dgm.train.engine import Engine


@torch.no_grad()
def sample_on_all(
    engine: Engine,
    objective: Objective,
    nets: Mapping[str, nn.Module],
    index: Tensor,
    labels: Tensor,
    seed: int,
    **knobs: Any,
) -> Tensor:
    """Make one image for each index and label [N], each process a part: [N, C, H, W] on all.

    An image follows from (seed, index, label) alone, however many processes there are.
    """
    count = len(index)
    each = -(-count // engine.world_size)
    # The last process may lack a few; it repeats the last image, and all take equal parts.
    mine = torch.arange(engine.rank * each, (engine.rank + 1) * each).clamp(max=count - 1)
    own_index, own_labels = index[mine].to(engine.device), labels[mine].to(engine.device)
    with engine.autocast():
        part = objective.sample(nets, each, own_labels, Draws.of(seed, own_index), **knobs)
    return engine.gather(part)[:count]
