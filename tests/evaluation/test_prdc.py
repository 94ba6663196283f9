"""PRDC, diversity and memorization; against published code: tests/references/test_densities."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dgm.evaluation import prdc as prdc_module
from dgm.evaluation.diversity import diversity_by_class, mean_pairwise_distance
from dgm.evaluation.memorization import memorization
from dgm.evaluation.prdc import knn_radii, nearest_neighbours, prdc


def sets(made: int = 90, real: int = 110) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(made, 6) * 0.8 + 0.3, torch.randn(real, 6)


def test_equal_distributions_have_the_stated_values():
    torch.manual_seed(1)
    found = prdc(torch.randn(1500, 3), torch.randn(1500, 3))
    assert found["coverage"] == pytest.approx(0.97, abs=0.015)  # 1 - 2^-5, three standard errors
    assert found["density"] == pytest.approx(1, abs=0.05)
    assert found["precision"] > 0.9 and found["recall"] > 0.9


def test_results_do_not_depend_on_the_block_size(monkeypatch: pytest.MonkeyPatch):
    made, real = sets()
    whole, near = prdc(made, real), nearest_neighbours(made, real)
    monkeypatch.setattr(prdc_module, "_MAX_DISTANCES", 500)
    monkeypatch.setattr(prdc_module, "_BLOCK", 17)
    assert prdc(made, real) == whole
    blocked = nearest_neighbours(made, real)
    torch.testing.assert_close(blocked[0], near[0])
    assert torch.equal(blocked[1], near[1])


def test_nearest_neighbours_are_the_nearest():
    made, real = sets()
    distance, row = nearest_neighbours(made, real)
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
    of_test = nearest_neighbours(test, train)[0]
    new = memorization(nearest_neighbours(fresh, train)[0], of_test)
    assert new["ratio"] == pytest.approx(1, abs=0.05) and new["nearer_than_test"] < 0.06
    distance, row = nearest_neighbours(torch.cat([fresh[:60], train[:40]]), train)
    assert 0.4 <= memorization(distance, of_test)["nearer_than_test"] < 0.45
    assert set(distance.argsort()[:40].tolist()) == set(range(60, 100))
    assert row[60:].tolist() == list(range(40))
    assert memorization(nearest_neighbours(train[:50], train)[0], of_test)["ratio"] < 1e-6
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
    assert none["coverage_by_class"]["b"] == 0 and none["share_by_class"] == {"a": 1, "b": 0}


def test_mean_pairwise_distance_is_the_mean_distance_of_pairs():
    x = torch.tensor([[0.0, 0], [3, 4], [0, 0]])
    assert mean_pairwise_distance(x) == pytest.approx((5 + 5 + 0) / 3)
    assert mean_pairwise_distance(x[:1]) == 0
