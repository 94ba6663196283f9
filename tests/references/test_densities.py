"""Density and coverage against package prdc 0.2, precision and recall against torch-fidelity.

Sources: prdc.compute_prdc of Naeem et al. 2020, "Reliable fidelity and diversity metrics for
generative models", with open balls; torch_fidelity.metric_prc for Kynkaanniemi et al. 2019,
"Improved precision and recall metric", with closed balls. Sets with duplicates lie on a grid of
integers, whose distances every implementation computes without rounding where they decide.
"""

from __future__ import annotations

import contextlib
import io

import numpy as np
import prdc
import pytest
import torch
from torch import Tensor
from torch_fidelity.metric_prc import prc_features_to_metric

from dgm.evaluation.diversity import diversity_by_class
from dgm.evaluation.prdc import COVERAGE_NEIGHBOURS
from dgm.evaluation.prdc import prdc as our_prdc


def theirs(made: Tensor, real: Tensor) -> dict[str, float]:
    """Return density and coverage of prdc, precision and recall of torch-fidelity."""
    arrays = [np.ascontiguousarray(x.double().numpy()) for x in (real, made)]
    with contextlib.redirect_stdout(io.StringIO()):
        of_prdc = prdc.compute_prdc(*arrays, nearest_k=COVERAGE_NEIGHBOURS)
    of_fidelity = prc_features_to_metric(made.double(), real.double(), verbose=False)
    return {
        "precision": of_fidelity["precision"], "recall": of_fidelity["recall"],
        "density": float(of_prdc["density"]), "coverage": float(of_prdc["coverage"]),
    }  # fmt: skip


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def grid(seed: int, *shape: int) -> Tensor:
    """Return points of a small grid: many are equal, and most distances are tied."""
    return torch.randint(0, 4, shape, generator=torch.Generator().manual_seed(seed)).float()


SETS = {
    "one distribution": (normal(0, 150, 6), normal(1, 130, 6)),
    "far from the origin": (normal(0, 150, 6) + 100, normal(1, 130, 6) + 100),
    "narrower and shifted": (0.6 * normal(2, 90, 8) + 0.4, normal(3, 120, 8)),
    "many dimensions": (normal(4, 80, 256), normal(5, 80, 256)),
    "apart": (normal(6, 60, 4) + 30, normal(7, 60, 4)),
    "copies of real images": (normal(8, 100, 6)[:5].repeat(20, 1), normal(8, 100, 6)),
    "grid with ties and duplicates": (grid(9, 200, 3), grid(10, 150, 3)),
    "every image several times": (grid(11, 12, 5).repeat(9, 1), grid(12, 12, 5).repeat(9, 1)),
    "grid against itself": (grid(13, 150, 3), grid(13, 150, 3)),
}


@pytest.mark.parametrize("made, real", SETS.values(), ids=SETS)
def test_prdc_matches_prdc_and_torch_fidelity(made: Tensor, real: Tensor):
    assert our_prdc(made, real) == pytest.approx(theirs(made, real), rel=1e-6)


def test_identical_sets_score_one_in_all_four_metrics():
    x = normal(14, 300, 6)
    ones = dict.fromkeys(("precision", "recall", "density", "coverage"), 1.0)
    assert our_prdc(x, x.clone()) == pytest.approx(ones, rel=1e-12)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    assert our_prdc(x[order], x) == pytest.approx(ones, rel=1e-12)
    assert theirs(x, x) == pytest.approx(ones, rel=1e-6)


def test_coverage_of_a_class_matches_prdc():
    for made, real in ((normal(15, 60, 4), normal(16, 60, 4)), (grid(17, 60, 3), grid(18, 60, 3))):
        labels = torch.zeros(60, dtype=torch.int64)
        found = diversity_by_class(made, labels, real, labels, {0: "one"})
        expected = theirs(made, real)["coverage"]
        assert found["coverage_by_class"]["one"] == pytest.approx(expected)
