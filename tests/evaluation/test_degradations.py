"""FD-cifar is near 0 for real images, and rises with whatever is done to them."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.nn import functional

from dgm.evaluation.classifier import train_classifier
from dgm.evaluation.features import of_classifier
from dgm.evaluation.frechet import Moments, frechet_distance
from dgm.training.engine import Engine
from shards import shapes

pytestmark = pytest.mark.slow

TRAIN, TEST = 600, 300


class Drawn:
    """Shapes of a split."""

    def __init__(self, split: str, count: int):
        self.pixels = np.stack([shapes.render(split, k) for k in range(count)])

    def __len__(self) -> int:
        return len(self.pixels)

    def images(self, index: np.ndarray) -> np.ndarray:
        return self.pixels[index]

    def labels(self, index: np.ndarray) -> np.ndarray:
        return (index % 10).astype(np.int64)


def blurred(pixels: np.ndarray, sigma: float) -> np.ndarray:
    place = torch.arange(-6, 7, dtype=torch.float32)
    line = torch.exp(-(place**2) / (2 * sigma**2))
    kernel = (torch.outer(line, line) / line.sum() ** 2).expand(3, 1, 13, 13)
    x = functional.pad(torch.from_numpy(pixels).permute(0, 3, 1, 2).float(), (6,) * 4, "reflect")
    return functional.conv2d(x, kernel, groups=3).round().byte().permute(0, 2, 3, 1).numpy()


def noised(pixels: np.ndarray, sigma: float) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, sigma, pixels.shape)
    return (pixels + noise).round().clip(0, 255).astype(np.uint8)


def without_classes(pixels: np.ndarray, dropped: float) -> np.ndarray:
    return pixels[np.arange(len(pixels)) % 10 >= dropped]


def test_distance_is_near_zero_and_rises_with_damage(engine: Engine):
    train, test = Drawn("train", TRAIN), Drawn("test", TEST)
    features = of_classifier(train_classifier(train, 10, 3, 0, engine.device))
    wanted = Moments.of(features.describe_all(engine, train))

    def distance(pixels: np.ndarray) -> float:
        seen = features.describe(engine, len(pixels), pixels.__getitem__)[0]
        return frechet_distance(Moments.of(seen), wanted)

    clean = distance(test.pixels)
    assert distance(train.pixels) == pytest.approx(0, abs=1e-6)
    harms: dict[Callable[[np.ndarray, float], np.ndarray], tuple[float, ...]] = {
        blurred: (0.5, 1, 3),
        noised: (8, 24, 64),
        without_classes: (2, 5, 8),
    }
    for harm, amounts in harms.items():
        found = [clean, *(distance(harm(test.pixels, amount)) for amount in amounts)]
        assert all(a < b for a, b in itertools.pairwise(found)), (harm, found)
        assert clean < 0.1 * found[-1], (harm, found)
