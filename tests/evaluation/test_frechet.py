"""The Frechet distance and what it is computed from."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dgm.evaluation.frechet import Moments, frechet_distance


def test_distance_of_gaussians_on_a_line_is_known():
    # (mu - mu')^2 + (sigma - sigma')^2, Dowson and Landau 1982.
    one = Moments(np.array([1.0]), np.array([[4.0]]))
    other = Moments(np.array([-2.0]), np.array([[0.25]]))
    assert frechet_distance(one, other) == pytest.approx(9 + 1.5**2)


def test_distance_of_commuting_covariances_is_known_and_turns_with_the_axes():
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(5, 5)))[0]
    a, b = np.array([1.0, 4, 9, 0, 2]), np.array([4.0, 1, 9, 1, 0])
    expected = ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    found = frechet_distance(
        Moments(np.zeros(5), turn @ np.diag(a) @ turn.T),
        Moments(np.zeros(5), turn @ np.diag(b) @ turn.T),
    )
    assert found == pytest.approx(expected, abs=1e-6)


def test_distance_to_itself_is_zero_and_both_ways_equal():
    draws = np.random.default_rng(1)
    one, other = (
        Moments.of(torch.from_numpy(draws.normal(size=(50, 8)) @ draws.normal(size=(8, 8))))
        for _ in range(2)
    )
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(one, other) == pytest.approx(frechet_distance(other, one))
    assert frechet_distance(one, other) > 1


def test_moments_are_mean_and_unbiased_covariance():
    values = torch.randn(30, 4)
    found = Moments.of(values)
    assert found.mean == pytest.approx(values.double().mean(0).numpy())
    assert found.covariance == pytest.approx(torch.cov(values.double().T).numpy())
    assert Moments.of(values[:, :1]).covariance.shape == (1, 1)
