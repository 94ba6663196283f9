"""Sampling spread over the processes of an engine, and the sheets that a run leaves."""

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
from dgm.training.oom import is_lack_of_memory
from dgm.training.sampler import Batches

_SHOWN = 20  # stored images that a family is given to show something with


@torch.no_grad()
def sample_on_all(
    engine: Engine,
    objective: Objective,
    nets: Nets,
    index: Tensor,
    labels: Tensor,
    seed: int,
    **knobs: Any,
) -> Tensor:
    """Make one image for each index and label [N], each process a part: [N, C, H, W] on all.

    An image follows from (seed, index, label) alone, however many processes there are.
    """

    def make(rows: Tensor) -> Tensor:
        own_index, own_labels = index[rows].to(engine.device), labels[rows].to(engine.device)
        draws = Draws.of(seed, own_index)
        with engine.autocast():
            try:
                return objective.sample(nets, len(rows), own_labels, draws, **knobs)
            except (RuntimeError, MemoryError) as error:
                if not is_lack_of_memory(error):
                    raise
                config = objective.sample_config
                batch = knobs.get("batch", getattr(config, "batch", len(rows)))
                raise UserError(
                    f"{batch} images at a time cannot be made in the memory of {engine.device}: "
                    "lower sample.batch (--batch of launch/sample.py), which changes no image"
                ) from error

    return engine.spread(len(index), make)


def draw_sheets(
    engine: Engine,
    objective: Objective,
    nets: Nets,
    num_classes: int,
    per_class: int,
    seed: int,
    batches: Batches,
) -> dict[str, np.ndarray]:
    """Draw uint8 [H, W, C] sheets by name, on the first process: samples, a row for each class.

    Of many classes or images those are drawn that `shown_classes` chooses. Each process makes a
    part of the samples; all must ask.
    """
    shape = batches.data.images(np.arange(1)).shape[1:3]
    classes, columns = shown_classes(num_classes, per_class, *shape)
    labels = torch.tensor(classes).repeat_interleave(columns)
    # An image keeps its number whatever else is shown.
    index = labels * per_class + torch.arange(columns).repeat(len(classes))
    made = sample_on_all(engine, objective, nets, index, labels, seed)
    if not engine.is_main:
        return {}
    sheets = {"samples": grid(to_uint8(made, objective.pixels), columns)}
    if isinstance(objective, Visualizable):
        with torch.no_grad(), engine.autocast():
            drawn = objective.visualize(nets, *batches.first_images(_SHOWN, engine.device))
        for name, images in drawn.items():
            rows, columns = fit_grid(*images.shape[:2], *images.shape[3:])
            sheet = to_uint8(images[:rows, :columns].flatten(0, 1), objective.pixels)
            sheets[name] = grid(sheet, columns)
    return sheets


def shown_classes(
    num_classes: int, per_class: int, height: int, width: int
) -> tuple[list[int], int]:
    """Return the classes, evenly spaced, and the images of each that fit on a sheet."""
    rows, columns = fit_grid(num_classes, per_class, height, width)
    return evenly_spaced(num_classes, rows), columns
