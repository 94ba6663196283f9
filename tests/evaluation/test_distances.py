"""Frechet distance, kernel distance and score, against torch-fidelity and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric

from dgm.evaluation.distances import (
    FeatureStatistics,
    class_score,
    frechet_distance,
    kernel_distance,
    squared_mmd,
)


def features(count: int, size: int, seed: int, shift: float = 0.0) -> Tensor:
    """Return correlated features of differing variance, non-negative as after a ReLU."""
    torch.manual_seed(seed)
    mixed = torch.randn(count, size, dtype=torch.float64) @ torch.randn(size, size).double()
    return (mixed / math.sqrt(size) + shift).clamp(min=0)


@pytest.mark.parametrize(("count", "size"), [(400, 64), (700, 128), (50, 64)])
def test_frechet_distance_is_torch_fidelitys(count: int, size: int):
    a, b = features(count, size, 0), features(count + 7, size, 1, 0.3)
    theirs = fid_statistics_to_metric(
        fid_features_to_statistics(a), fid_features_to_statistics(b), verbose=False
    )["frechet_inception_distance"]
    ours = frechet_distance(*map(FeatureStatistics.from_features, (a, b)))
    assert ours == pytest.approx(theirs, rel=1e-6)


def test_frechet_distance_of_rotated_commuting_covariances_is_known():
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(5, 5)))[0]
    a, b = np.array([1.0, 4, 9, 0, 2]), np.array([4.0, 1, 9, 1, 0])
    one, other = (
        FeatureStatistics(np.zeros(5), rotation @ np.diag(variances) @ rotation.T)
        for variances in (a, b)
    )
    expected = ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert frechet_distance(one, other) == pytest.approx(expected, abs=1e-6)
    assert frechet_distance(one, other) == pytest.approx(frechet_distance(other, one))
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-9)


def test_statistics_are_mean_and_unbiased_covariance():
    values = torch.randn(30, 4)
    found = FeatureStatistics.from_features(values)
    assert found.mean == pytest.approx(values.double().mean(0).numpy())
    assert found.covariance == pytest.approx(torch.cov(values.double().T).numpy())
    assert FeatureStatistics.from_features(values[:, :1]).covariance.shape == (1, 1)


def kid(a: Tensor, b: Tensor, subsets: int, size: int) -> dict[str, float]:
    return kid_features_to_metric(a, b, kid_subsets=subsets, kid_subset_size=size, verbose=False)


def test_kernel_distance_of_whole_sets_is_torch_fidelitys():
    a, b = features(300, 32, 0), features(300, 32, 1, 0.2)
    theirs = kid(a, b, 1, 300)["kernel_inception_distance_mean"]
    assert squared_mmd(a, b) == pytest.approx(theirs, rel=1e-6)
    assert kernel_distance(a, b, seed=0, size=300) == pytest.approx(theirs, rel=1e-6)


def test_kernel_distance_of_subsets_agrees_with_torch_fidelity_on_average():
    a, b = features(300, 32, 0), features(400, 32, 0, 0.2)
    theirs = kid(a, b, 15, 100)
    mean, spread = (theirs[f"kernel_inception_distance_{name}"] for name in ("mean", "std"))
    ours = kernel_distance(a, b, seed=0, subsets=15, size=100)
    assert ours == pytest.approx(mean, abs=5 * spread * math.sqrt(2 / 15))  # five standard errors
    assert kernel_distance(a, b, seed=0, subsets=15, size=100) == ours
    assert kernel_distance(a, b, seed=1, subsets=15, size=100) != ours


def test_kernel_distance_has_no_bias():
    # Halves of one set: the mean of many lies around zero, on either side.
    whole = features(4000, 8, 7)
    halves = [squared_mmd(whole[k : k + 20], whole[k + 20 : k + 40]) for k in range(0, 4000, 40)]
    error = torch.tensor(halves).std() / math.sqrt(len(halves))
    assert abs(sum(halves) / len(halves)) < 4 * error and min(halves) < 0 < max(halves)
    same = features(40, 8, 0)
    assert squared_mmd(same, same[torch.randperm(40)]) < 0


def test_score_is_torch_fidelitys():
    torch.manual_seed(0)
    logits = torch.randn(205, 10) * 3
    for splits in (1, 10):
        theirs = isc_features_to_metric(logits, splits, shuffle=False)["inception_score_mean"]
        assert class_score(logits, splits) == pytest.approx(theirs, rel=1e-6)


def test_score_reaches_from_one_to_the_number_of_classes():
    sure = torch.eye(10).repeat(10, 1) * 100
    assert class_score(sure) == pytest.approx(10)
    assert class_score(torch.zeros(100, 10)) == pytest.approx(1)
