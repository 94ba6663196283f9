"""What it takes to make images with a trained run."""

from __future__ import annotations

import statistics
import time

import torch

from dgm.objective import Nets, Objective
from dgm.training.engine import Engine
from dgm.training.sampling import sample_distributed

_ROUNDS, _SECONDS = 3, 1.0  # at least: a GAN's images take a millisecond each


def sampling_cost(
    engine: Engine, objective: Objective, nets: Nets, num_images: int, num_classes: int, seed: int
) -> dict[str, float]:
    """Count parameters, and time the making of `num_images` images as the run's `sample.*` says.

    `num_parameters` of all nets, and `num_parameters_NAME` of each where there are several;
    `seconds_per_image` of all processes together, the median of three rounds and more, for a second
    at least, after a first one. All processes must ask.
    """
    index = torch.arange(num_images)
    labels = index % num_classes
    times: list[float] = []
    while engine.any_rank(len(times) < 1 + _ROUNDS or sum(times[1:]) < _SECONDS):
        began = time.perf_counter()
        made = sample_distributed(engine, objective, nets, index, labels, seed)
        made[:, 0, 0, 0].tolist()  # wait for the device
        times.append(time.perf_counter() - began)
    sizes = {name: sum(p.numel() for p in net.parameters()) for name, net in nets.items()}
    parts = {f"num_parameters_{name}": size for name, size in sizes.items()}
    return {
        "num_parameters": sum(sizes.values()),
        **(parts if len(parts) > 1 else {}),
        "seconds_per_image": statistics.median(times[1:]) / num_images,
    }
