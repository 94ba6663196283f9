"""Parameters and sampling time of a trained run."""

from __future__ import annotations

import statistics
import time

import torch

from dgm.objective import Nets, Objective
from dgm.training.engine import Engine
from dgm.training.sampling import sample_distributed

_MIN_ROUNDS, _MIN_SECONDS = 3, 1.0  # a GAN's images take a millisecond each


def sampling_cost(
    engine: Engine, objective: Objective, nets: Nets, num_images: int, num_classes: int, seed: int
) -> dict[str, float]:
    """Count parameters, and time sampling `num_images` images with the run's `sample.*` settings.

    Return `num_parameters` of all nets, `num_parameters_NAME` of each if there are several, and
    `seconds_per_image` of all processes together: the median over rounds, at least three and for
    at least a second, after a warm-up round. Collective: call on all ranks.
    """
    index = torch.arange(num_images)
    labels = index % num_classes
    times: list[float] = []
    while engine.any_rank(len(times) < 1 + _MIN_ROUNDS or sum(times[1:]) < _MIN_SECONDS):
        start = time.perf_counter()
        samples = sample_distributed(engine, objective, nets, index, labels, seed)
        samples[:, 0, 0, 0].tolist()  # wait for the device
        times.append(time.perf_counter() - start)
    sizes = {name: sum(p.numel() for p in net.parameters()) for name, net in nets.items()}
    parts = {f"num_parameters_{name}": size for name, size in sizes.items()}
    return {
        "num_parameters": sum(sizes.values()),
        **(parts if len(parts) > 1 else {}),
        "seconds_per_image": statistics.median(times[1:]) / num_images,
    }
