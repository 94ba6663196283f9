"""Distributed sampling, and the image grids of a run."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from dgm.common.errors import UserError
from dgm.images import evenly_spaced, fit_grid, grid, to_uint8
from dgm.objective import Nets, Objective, Visualizable
from dgm.rng import Draws
from dgm.training.engine import Engine
from dgm.training.oom import is_out_of_memory
from dgm.training.sampler import BatchSampler

_NUM_EXAMPLES = 20  # stored images for a family's own visualizations


@torch.no_grad()
def sample_distributed(
    engine: Engine,
    objective: Objective,
    nets: Nets,
    index: Tensor,
    labels: Tensor,
    seed: int,
    **knobs: Any,
) -> Tensor:
    """Return one sample per index and label [N], [N, C, H, W] on all processes. Collective.

    An image depends only on (seed, index, label), not on the number of processes.
    """

    def sample(rows: Tensor) -> Tensor:
        part_index, part_labels = index[rows].to(engine.device), labels[rows].to(engine.device)
        draws = Draws.of(seed, part_index)
        with engine.autocast():
            try:
                return objective.sample(nets, len(rows), part_labels, draws, **knobs)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                config = objective.sample_config
                batch = knobs.get("batch", getattr(config, "batch", len(rows)))
                raise UserError(
                    f"{batch} images at a time cannot be made in the memory of {engine.device}: "
                    "lower sample.batch (--batch of launch/sample.py), which changes no image"
                ) from error

    return engine.map_rows(len(index), sample)


def draw_grids(
    engine: Engine,
    objective: Objective,
    nets: Nets,
    num_classes: int,
    per_class: int,
    seed: int,
    batches: BatchSampler,
) -> dict[str, np.ndarray]:
    """Return uint8 [H, W, C] grids by name: samples, a row per class, and the family's own grids.

    If not all classes or images fit, `grid_classes` chooses. Empty on all processes but the first.
    Collective.
    """
    shape = batches.data.images(np.arange(1)).shape[1:3]
    classes, columns = grid_classes(num_classes, per_class, *shape)
    labels = torch.tensor(classes).repeat_interleave(columns)
    # The index of an image does not depend on the other images of the grid.
    index = labels * per_class + torch.arange(columns).repeat(len(classes))
    samples = sample_distributed(engine, objective, nets, index, labels, seed)
    if not engine.is_main:
        return {}
    grids = {"samples": grid(to_uint8(samples, objective.pixels), columns)}
    if isinstance(objective, Visualizable):
        with torch.no_grad(), engine.autocast():
            drawn = objective.visualize(nets, *batches.first_images(_NUM_EXAMPLES, engine.device))
        for name, images in drawn.items():
            rows, columns = fit_grid(*images.shape[:2], *images.shape[3:])
            tiles = to_uint8(images[:rows, :columns].flatten(0, 1), objective.pixels)
            grids[name] = grid(tiles, columns)
    return grids


def grid_classes(
    num_classes: int, per_class: int, height: int, width: int
) -> tuple[list[int], int]:
    """Return the classes of a grid, evenly spaced if not all fit, and the images of each."""
    rows, columns = fit_grid(num_classes, per_class, height, width)
    return evenly_spaced(num_classes, rows), columns
