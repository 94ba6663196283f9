"""PRDC against package prdc 0.2 and torch-fidelity; diversity and memorization.

Sources: for density and coverage prdc.compute_prdc of Naeem et al. 2020, "Reliable fidelity and
diversity metrics for generative models", with open balls; for precision and recall
torch_fidelity.metric_prc of Kynkaanniemi et al. 2019, "Improved precision and recall metric", with
closed balls. Sets with duplicates lie on a grid of
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

from dgm.evaluation import prdc as prdc_module
from dgm.evaluation.diversity import diversity_by_class, mean_pairwise_distance
from dgm.evaluation.memorization import memorization
from dgm.evaluation.prdc import COVERAGE_NEIGHBORS, knn_radii, nearest_neighbors
from dgm.evaluation.prdc import prdc as our_prdc


def theirs(made: Tensor, real: Tensor) -> dict[str, float]:
    """Return density and coverage of prdc, precision and recall of torch-fidelity."""
    arrays = [np.ascontiguousarray(x.double().numpy()) for x in (real, made)]
    with contextlib.redirect_stdout(io.StringIO()):
        of_prdc = prdc.compute_prdc(*arrays, nearest_k=COVERAGE_NEIGHBORS)
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


def test_coverage_of_a_class_matches_prdc():
    for made, real in ((normal(15, 60, 4), normal(16, 60, 4)), (grid(17, 60, 3), grid(18, 60, 3))):
        labels = torch.zeros(60, dtype=torch.int64)
        found = diversity_by_class(made, labels, real, labels, {0: "one"})
        expected = theirs(made, real)["coverage"]
        assert found["coverage_by_class"]["one"] == pytest.approx(expected)


def sets(made: int = 90, real: int = 110) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(made, 6) * 0.8 + 0.3, torch.randn(real, 6)


def test_equal_distributions_have_the_stated_values():
    torch.manual_seed(1)
    found = our_prdc(torch.randn(1500, 3), torch.randn(1500, 3))
    assert found["coverage"] == pytest.approx(0.97, abs=0.015)  # 1 - 2^-5, three standard errors
    assert found["density"] == pytest.approx(1, abs=0.05)
    assert found["precision"] > 0.9 and found["recall"] > 0.9


def test_results_do_not_depend_on_the_block_size(monkeypatch: pytest.MonkeyPatch):
    made, real = sets()
    whole, near = our_prdc(made, real), nearest_neighbors(made, real)
    monkeypatch.setattr(prdc_module, "_MAX_DISTANCES", 500)
    monkeypatch.setattr(prdc_module, "_BLOCK", 17)
    assert our_prdc(made, real) == whole
    blocked = nearest_neighbors(made, real)
    torch.testing.assert_close(blocked[0], near[0])
    assert torch.equal(blocked[1], near[1])


def test_nearest_neighbors_are_the_nearest():
    made, real = sets()
    distance, row = nearest_neighbors(made, real)
    apart = torch.cdist(made.double(), real.double(), compute_mode="donot_use_mm_for_euclid_dist")
    assert torch.equal(row, apart.argmin(1))
    torch.testing.assert_close(distance, apart.min(1).values)
    expected = torch.cdist(real.double(), real.double()).sort(1).values[:, 4]
    torch.testing.assert_close(knn_radii(real, 4), expected)


def test_copies_of_training_images_are_detected():
    torch.manual_seed(2)
    train, test, fresh = (
        torch.randint(0, 256, (n, 48), dtype=torch.uint8) for n in (300, 200, 100)
    )
    of_test = nearest_neighbors(test, train)[0]
    new = memorization(nearest_neighbors(fresh, train)[0], of_test)
    assert new["ratio"] == pytest.approx(1, abs=0.05) and new["nearer_than_test"] < 0.06
    distance, row = nearest_neighbors(torch.cat([fresh[:60], train[:40]]), train)
    assert 0.4 <= memorization(distance, of_test)["nearer_than_test"] < 0.45
    assert set(distance.argsort()[:40].tolist()) == set(range(60, 100))
    assert row[60:].tolist() == list(range(40))
    assert memorization(nearest_neighbors(train[:50], train)[0], of_test)["ratio"] < 1e-6
    assert "ratio" not in memorization(of_test, torch.zeros(5).double())


def test_a_class_of_one_image_is_detected():
    torch.manual_seed(3)
    labels = torch.arange(200) % 2
    real = torch.randn(200, 4) + 10 * labels[:, None]
    made = torch.randn(200, 4) + 10 * labels[:, None]
    names = {0: "a", 1: "b"}
    alike = diversity_by_class(made, labels, real, labels, names)
    assert alike["diversity_by_class"]["b"] == pytest.approx(1, abs=0.1)
    assert alike["coverage_by_class"]["b"] > 0.9
    made[labels == 1] = made[1].clone()
    found = diversity_by_class(made, labels, real, labels, names)
    assert found["diversity_by_class"]["b"] < 1e-6 and found["coverage_by_class"]["b"] < 0.2
    assert found["diversity_by_class"]["a"] == alike["diversity_by_class"]["a"]
    none = diversity_by_class(made[labels == 0], torch.zeros(100), real, labels, {0: "a", 1: "b"})
    assert none["coverage_by_class"]["b"] == 0 and none["fraction_by_class"] == {"a": 1, "b": 0}


def test_mean_pairwise_distance_is_the_mean_distance_of_pairs():
    x = torch.tensor([[0.0, 0], [3, 4], [0, 0]])
    assert mean_pairwise_distance(x) == pytest.approx((5 + 5 + 0) / 3)
    assert mean_pairwise_distance(x[:1]) == 0
