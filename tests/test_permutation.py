"""The order of the images of an epoch."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dgm.rng import permutation


@given(st.integers(1, 300), st.integers(0, 2**64 - 1), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_permutation_holds_each_image_once(length: int, seed: int, epoch: int):
    order = permutation(seed, epoch, length)
    assert torch.equal(order.sort().values, torch.arange(length))
    assert torch.equal(order, permutation(seed, epoch, length))


@pytest.mark.parametrize("seed, epoch", [(0, 1), (1, 0), (2**32, 0), (0, 1000)])
def test_permutation_differs_for_each_epoch_and_seed(seed: int, epoch: int):
    # Two random orders agree at one place on average (Poisson); more than 8 once in a million.
    assert (permutation(0, 0, 1000) == permutation(seed, epoch, 1000)).sum() <= 8


def test_permutation_brings_every_image_to_every_place():
    firsts = torch.stack([permutation(0, epoch, 8) for epoch in range(1000)])
    counts = torch.stack([torch.bincount(place, minlength=8) for place in firsts.T]).double()
    # 64 cells of 125: a chi-square of 49 degrees of freedom; four standard deviations.
    assert abs(float(((counts - 125) ** 2 / 125).sum()) - 49) < 4 * math.sqrt(2 * 49)
