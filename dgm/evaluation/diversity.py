"""Diversity of the images of each class, which exposes a class whose images are all the same."""

from __future__ import annotations

import torch
from torch import Tensor

from dgm.evaluation.prdc import (
    COVERAGE_NEIGHBORS,
    in_open_ball,
    knn_radii,
    pairwise_distances,
)

MIN_REAL_IMAGES = COVERAGE_NEIGHBORS + 1  # per class
_MAX_IMAGES = 1000  # per class, since all pairs are compared


def mean_pairwise_distance(features: Tensor) -> float:
    """Return the mean distance between two images of a set [N, D]; 0 for fewer than two."""
    count = len(features)
    if count < 2:
        return 0.0
    total = sum(float(d.sum()) for d in pairwise_distances(features, features))
    return total / (count * (count - 1))


def diversity_by_class(
    generated: Tensor,
    labels: Tensor,
    real: Tensor,
    real_labels: Tensor,
    classes: dict[int, str],
) -> dict[str, dict[str, float]]:
    """Compare generated features [M, D] with real ones [N, D] by class; `classes` names labels.

    diversity_by_class: mean distance between two generated images over that of two real ones: 1 if
    they are as diverse (or the real ones are all the same), 0 if all are the same.
    coverage_by_class: fraction of real images that have a generated one nearer than their fifth
    real neighbor (Naeem et al. 2020, equation 3), with as many real images as generated ones:
    1 - 2^-5 = 0.97 on average for images of one distribution. fraction_by_class: fraction of the
    generated images that are of the class.
    """
    metrics: dict[str, dict[str, float]] = {
        "diversity_by_class": {}, "coverage_by_class": {}, "fraction_by_class": {}
    }  # fmt: skip
    for label, name in classes.items():
        own = generated[labels == label][:_MAX_IMAGES]
        reference = real[real_labels == label]
        reference = reference[: max(MIN_REAL_IMAGES, min(len(own), _MAX_IMAGES))]
        real_distance = mean_pairwise_distance(reference)
        ratio = mean_pairwise_distance(own) / real_distance if real_distance else 1.0
        radii, coverage = knn_radii(reference, COVERAGE_NEIGHBORS), 0.0
        if len(own):
            nearest = torch.cat([d.min(1).values for d in pairwise_distances(reference, own)])
            coverage = float(in_open_ball(nearest, radii).double().mean())
        metrics["diversity_by_class"][name] = ratio
        metrics["coverage_by_class"][name] = coverage
        metrics["fraction_by_class"][name] = float((labels == label).double().mean())
    return metrics
