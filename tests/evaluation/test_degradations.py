"""FD-classifier is near 0 for real images, and rises with the strength of degradations."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from array_images import ArrayImages
from torch.nn import functional

from dgm.evaluation.classifier import train_classifier
from dgm.evaluation.distances import FeatureStatistics, frechet_distance
from dgm.evaluation.features import classifier_features
from dgm.training.engine import Engine
from shards import shapes

pytestmark = pytest.mark.slow

TRAIN, TEST = 600, 300


def drawn(split: str, count: int) -> ArrayImages:
    return ArrayImages(np.stack([shapes.render(split, k) for k in range(count)]),
                       np.arange(count) % 10)  # fmt: skip


def blurred(pixels: np.ndarray, sigma: float) -> np.ndarray:
    offset = torch.arange(-6, 7, dtype=torch.float32)
    gaussian = torch.exp(-(offset**2) / (2 * sigma**2))
    kernel = (torch.outer(gaussian, gaussian) / gaussian.sum() ** 2).expand(3, 1, 13, 13)
    x = functional.pad(torch.from_numpy(pixels).permute(0, 3, 1, 2).float(), (6,) * 4, "reflect")
    return functional.conv2d(x, kernel, groups=3).round().byte().permute(0, 2, 3, 1).numpy()


def noised(pixels: np.ndarray, sigma: float) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, sigma, pixels.shape)
    return (pixels + noise).round().clip(0, 255).astype(np.uint8)


def without_classes(pixels: np.ndarray, dropped: float) -> np.ndarray:
    return pixels[np.arange(len(pixels)) % 10 >= dropped]


def test_distance_is_near_zero_and_rises_with_degradation(engine: Engine):
    train, test = drawn("train", TRAIN), drawn("test", TEST)
    extractor = classifier_features(train_classifier(train, 10, 3, 0, engine.device))

    def statistics(pixels: np.ndarray) -> FeatureStatistics:
        features, _ = extractor.compute(engine, len(pixels), pixels.__getitem__)
        return FeatureStatistics.from_features(features)

    real = statistics(train.pixels)

    def distance(pixels: np.ndarray) -> float:
        return frechet_distance(statistics(pixels), real)

    clean = distance(test.pixels)
    assert distance(train.pixels) == pytest.approx(0, abs=1e-6)
    degradations: dict[Callable[[np.ndarray, float], np.ndarray], tuple[float, ...]] = {
        blurred: (0.5, 1, 3),
        noised: (8, 24, 64),
        without_classes: (2, 5, 8),
    }
    for degrade, strengths in degradations.items():
        found = [clean, *(distance(degrade(test.pixels, s)) for s in strengths)]
        assert all(a < b for a, b in itertools.pairwise(found)), (degrade, found)
        assert clean < 0.1 * found[-1], (degrade, found)
