"""Nearest training images of generated ones: are they copies?"""

from __future__ import annotations

from torch import Tensor

_QUANTILE = 0.01  # fraction of test images that are nearer than the threshold


def memorization(generated: Tensor, test: Tensor) -> dict[str, float]:
    """Compare distances to the nearest training image: of generated [M] and of test images [N].

    distance, distance_of_test: medians. ratio: the first over the second, 1 where generated images
    are as new as test images, below 1 where they repeat training images; left out if test images
    are training images. nearer_than_test: fraction of generated images that lie nearer than all
    but 1 % of the test images, 0.01 where they are as new.
    """
    median, expected = generated.median(), test.median()
    metrics = {
        "distance": float(median),
        "distance_of_test": float(expected),
        "nearer_than_test": float((generated < test.quantile(_QUANTILE)).double().mean()),
    }
    return {**metrics, "ratio": float(median / expected)} if expected > 0 else metrics
