"""Overlap of sets and nearest neighbours, against torch-fidelity and against doing it slowly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch_fidelity.metric_prc import prc_features_to_metric

from dgm.evaluation import prdc
from dgm.evaluation.diversity import diversity_by_class, spread_within
from dgm.evaluation.memorization import Near, memorisation, nearest_first
from dgm.evaluation.prdc import nearest, overlap, radii
from dgm.training.engine import Engine


def sets(made: int = 90, real: int = 110) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(made, 6) * 0.8 + 0.3, torch.randn(real, 6)


def test_precision_and_recall_are_torch_fidelitys(engine: Engine):
    made, real = sets()
    theirs = prc_features_to_metric(made, real, verbose=False)
    ours = overlap(engine, made, real)
    assert ours["precision"] == pytest.approx(theirs["precision"], rel=1e-6)
    assert ours["recall"] == pytest.approx(theirs["recall"], rel=1e-6)
    assert 0.2 < ours["recall"] < ours["precision"] < 1


def test_density_and_coverage_are_their_formulas(engine: Engine):
    made, real = sets()
    apart = [[float((x - y).norm()) for y in real] for x in real]
    reach = [sorted(row)[5] for row in apart]  # the first is the image itself
    inside = torch.tensor(
        [[float((x - y).norm()) <= r for y, r in zip(real, reach, strict=True)] for x in made]
    )
    found = overlap(engine, made, real)
    assert found["density"] == pytest.approx(float(inside.sum()) / (5 * len(made)))
    assert found["coverage"] == pytest.approx(float(inside.any(0).double().mean()))


def test_equal_sets_overlap_as_is_said(engine: Engine):
    torch.manual_seed(1)
    found = overlap(engine, torch.randn(1500, 3), torch.randn(1500, 3))
    assert found["coverage"] == pytest.approx(0.97, abs=0.015)  # 1 - 2^-5, three standard errors
    assert found["density"] == pytest.approx(1, abs=0.05)
    assert found["precision"] > 0.9 and found["recall"] > 0.9


def test_few_rows_at_a_time_find_the_same(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    made, real = sets()
    whole, near = overlap(engine, made, real), nearest(engine, made, real)
    monkeypatch.setattr(prdc, "_AT_ONCE", 500)
    monkeypatch.setattr(prdc, "_BLOCK", 17)
    assert overlap(engine, made, real) == whole
    blocked = nearest(engine, made, real)
    torch.testing.assert_close(blocked[0], near[0])
    assert torch.equal(blocked[1], near[1])


def test_nearest_is_the_nearest(engine: Engine):
    made, real = sets()
    distance, row = nearest(engine, made, real)
    apart = torch.cdist(made.double(), real.double(), compute_mode="donot_use_mm_for_euclid_dist")
    assert torch.equal(row, apart.argmin(1))
    torch.testing.assert_close(distance, apart.min(1).values)
    expected = torch.cdist(real.double(), real.double()).sort(1).values[:, 4]
    torch.testing.assert_close(radii(engine, real, 4), expected)


def test_copies_of_training_images_are_seen(engine: Engine):
    torch.manual_seed(2)
    train, test, fresh = (
        torch.randint(0, 256, (n, 48), dtype=torch.uint8) for n in (300, 200, 100)
    )
    expected = Near.of(engine, test, train)
    honest = memorisation(Near.of(engine, fresh, train), expected)
    assert honest["ratio"] == pytest.approx(1, abs=0.05) and honest["nearer_than_test"] < 0.06
    copied = torch.cat([fresh[:60], train[:40]])
    near = Near.of(engine, copied, train)
    found = memorisation(near, expected)
    assert 0.4 <= found["nearer_than_test"] < 0.45
    assert set(nearest_first(near, 40).tolist()) == set(range(60, 100))
    assert near.row[60:].tolist() == list(range(40))
    assert memorisation(Near.of(engine, train[:50], train), expected)["ratio"] < 1e-6


def test_a_class_of_one_image_is_seen(engine: Engine):
    torch.manual_seed(3)
    labels = torch.arange(200) % 2
    real = torch.randn(200, 4) + 10 * labels[:, None]
    made = torch.randn(200, 4) + 10 * labels[:, None]
    names = {0: "a", 1: "b"}
    alike = diversity_by_class(engine, made, labels, real, labels, names)
    assert alike["diversity_by_class"]["b"] == pytest.approx(1, abs=0.1)
    assert alike["coverage_by_class"]["b"] > 0.9
    made[labels == 1] = made[1].clone()
    found = diversity_by_class(engine, made, labels, real, labels, names)
    assert found["diversity_by_class"]["b"] < 1e-6 and found["coverage_by_class"]["b"] < 0.2
    assert found["diversity_by_class"]["a"] == alike["diversity_by_class"]["a"]
    none = diversity_by_class(
        engine, made[labels == 0], torch.zeros(100), real, labels, {0: "a", 1: "b"}
    )
    assert none["coverage_by_class"]["b"] == 0 and none["share_by_class"] == {"a": 1, "b": 0}


def test_spread_within_is_the_mean_distance_of_pairs():
    x = torch.tensor([[0.0, 0], [3, 4], [0, 0]])
    assert spread_within(x) == pytest.approx((5 + 5 + 0) / 3)
    assert spread_within(x[:1]) == 0
