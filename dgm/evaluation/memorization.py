"""Nearest training images of generated ones: are they copies?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dgm.evaluation.prdc import nearest
from dgm.training.engine import Engine

_FEW = 0.01  # of the real test images, whose nearest training images are taken for chance


@dataclass(frozen=True)
class Near:
    """The nearest training image of each image: its distance and its row, each [N]."""

    distance: Tensor
    row: Tensor

    @staticmethod
    def of(engine: Engine, images: Tensor, train: Tensor) -> Near:
        """Look for images [N, D] among train [M, D]; D are features or grey levels."""
        return Near(*nearest(engine, images, train))

    def scaled(self, factor: float) -> Near:
        """Give the same with distances in another unit."""
        return Near(self.distance * factor, self.row)


def memorisation(made: Near, test: Near) -> dict[str, float]:
    """Compare how near generated images and real test images lie to training images.

    distance, distance_of_test: medians over images; ratio: the first over the second, 1 where
    generated images are as new as test images are, less where they repeat the training images.
    nearer_than_test: share of generated images that lie nearer than all but 1 % of the test images
    do, 0.01 where they are as new.
    """
    median, expected = made.distance.median(), test.distance.median()
    line = test.distance.quantile(_FEW)
    found = {
        "distance": float(median),
        "distance_of_test": float(expected),
        "nearer_than_test": float((made.distance < line).double().mean()),
    }
    # Where the test images are training images, nothing can be said.
    return {**found, "ratio": float(median / expected)} if expected > 0 else found


def nearest_first(near: Near, count: int) -> Tensor:
    """Number the `count` images that lie nearest to a training image, nearest first."""
    return torch.argsort(near.distance, stable=True)[:count]
