"""How various the images of each class are: a class that always looks the same shows here."""

from __future__ import annotations

import torch
from torch import Tensor

from dgm.evaluation.prdc import COVERAGE_NEIGHBOURS, distances, in_open_ball, radii
from dgm.training.engine import Engine

LEAST_REAL = COVERAGE_NEIGHBOURS + 1  # real images of a class
_MOST = 1000  # images of a class that are compared pair by pair


def spread_within(features: Tensor) -> float:
    """Measure the mean distance between two images of a set [N, D]; 0 for less than two."""
    count = len(features)
    if count < 2:
        return 0.0
    return sum(float(d.sum()) for d in distances(features, features)) / (count * (count - 1))


def diversity_by_class(
    engine: Engine,
    made: Tensor,
    labels: Tensor,
    real: Tensor,
    real_labels: Tensor,
    classes: dict[int, str],
) -> dict[str, dict[str, float]]:
    """Compare generated images [M, D] with real ones [N, D], class by class: names by label.

    diversity_by_class: mean distance between two generated images over that of two real ones, 1
    where they are as various (or the real ones are all the same), 0 where all are the same.
    coverage_by_class: fraction of real images that have a generated one nearer than their fifth
    real neighbour (Naeem et al. 2020, equation 3), with as many real images as generated ones:
    1 - 2^-5 = 0.97 on average for images of one distribution. share_by_class: fraction of the
    generated images that are of the class.
    """
    found: dict[str, dict[str, float]] = {
        "diversity_by_class": {}, "coverage_by_class": {}, "share_by_class": {}
    }  # fmt: skip
    for label, name in classes.items():
        own, theirs = made[labels == label][:_MOST], real[real_labels == label]
        theirs = theirs[: max(LEAST_REAL, min(len(own), _MOST))]
        widest = spread_within(theirs)
        found["diversity_by_class"][name] = spread_within(own) / widest if widest else 1.0
        reach = radii(engine, theirs, COVERAGE_NEIGHBOURS).cpu()
        covered = 0.0
        if len(own):
            near = torch.cat([d.min(1).values for d in distances(theirs, own)])
            covered = float(in_open_ball(near, reach.to(near.device)).double().mean())
        found["coverage_by_class"][name] = covered
        found["share_by_class"][name] = float((labels == label).double().mean())
    return found
