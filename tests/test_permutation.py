"""The order of the images of an epoch."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dgm import rng
from dgm.rng import permutation, permutation_block


@given(st.integers(1, 300), st.integers(0, 2**64 - 1), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_permutation_holds_each_image_once(length: int, seed: int, epoch: int):
    order = permutation(seed, epoch, length)
    assert torch.equal(order.sort().values, torch.arange(length))
    assert torch.equal(order, permutation(seed, epoch, length))


@pytest.mark.slow
@given(st.integers(17, 1000), st.integers(0, 2**64 - 1), st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_permutation_block_by_block_holds_each_image_once(length: int, seed: int, epoch: int):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rng, "PERMUTATION_BLOCK", 16)
        blocks = [
            permutation_block(seed, epoch, length, block) for block in range(-(-length // 16))
        ]
        assert [len(block) for block in blocks[:-1]] == [16] * (len(blocks) - 1)
        assert torch.equal(torch.cat(blocks).sort().values, torch.arange(length))
        assert torch.equal(torch.cat(blocks), permutation(seed, epoch, length))


def test_a_large_permutation_looks_random():
    length, cells = 100_000, 32
    orders = [permutation(seed, epoch, length) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    places = torch.arange(length)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (orders[one] == orders[other]).sum() <= 8
    for images in orders:
        assert torch.equal(images.sort().values, places)
        for before, after in ((places, images), (images[:-1], images[1:])):
            # Where an image lies and what comes next: 1,024 cells, 961 degrees of freedom.
            cell = before * cells // length * cells + after * cells // length
            counts = torch.bincount(cell, minlength=cells**2).double()
            mean = len(after) / cells**2
            assert abs(float(((counts - mean) ** 2 / mean).sum()) - 961) < 4 * math.sqrt(2 * 961)


@pytest.mark.parametrize("seed, epoch", [(0, 1), (1, 0), (2**32, 0), (0, 1000)])
def test_permutation_differs_for_each_epoch_and_seed(seed: int, epoch: int):
    # Two random orders agree at one place on average (Poisson); more than 8 once in a million.
    assert (permutation(0, 0, 1000) == permutation(seed, epoch, 1000)).sum() <= 8


def test_permutation_brings_every_image_to_every_place():
    firsts = torch.stack([permutation(0, epoch, 8) for epoch in range(1000)])
    counts = torch.stack([torch.bincount(place, minlength=8) for place in firsts.T]).double()
    # 64 cells of 125: a chi-square of 49 degrees of freedom; four standard deviations.
    assert abs(float(((counts - 125) ** 2 / 125).sum()) - 49) < 4 * math.sqrt(2 * 49)
