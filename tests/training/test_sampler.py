"""The images of each step and process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dgm.common.errors import UserError
from dgm.rng import PERMUTATION_BLOCK, permutation, permutation_block
from dgm.training import sampler
from dgm.training.sampler import BatchSampler
from shards.reader import Shards

CPU = torch.device("cpu")


class Numbered:
    """Images of 2x2 pixels that hold their own index, up to 65,535 of them."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def images(self, index: np.ndarray) -> np.ndarray:
        made = np.zeros((len(index), 2, 2, 3), np.uint8)
        made[:, 0, 0, 0], made[:, 0, 0, 1] = index // 256, index % 256
        return made

    def labels(self, index: np.ndarray) -> np.ndarray:
        return index % 10


def indices_in(images: Tensor) -> list[int]:
    return (images[:, 0, 0, 0].long() * 256 + images[:, 0, 0, 1]).tolist()


def step(batches: BatchSampler, images_seen: int) -> list[list[int]]:
    """Return [image, epoch] of a step in order; check images, labels and draws."""
    seen = []
    for batch, draws in batches.micro_batches(images_seen, CPU):
        assert batch.images.dtype == torch.uint8 and batch.labels.dtype == torch.int64
        assert indices_in(batch.images) == draws.index.tolist()
        assert torch.equal(batch.labels, draws.index % 10)
        assert batch.step == images_seen // batches.global_batch
        seen += torch.stack([draws.index, draws.step], 1).tolist()
    return seen


@given(
    length=st.integers(1, 40),
    per_rank=st.integers(1, 6),
    micro=st.integers(1, 6),
    world_size=st.integers(1, 4),
    start=st.integers(0, 100),
    seed=st.integers(0, 2**40),
)
@settings(max_examples=30, deadline=None)
def test_processes_and_micro_batches_divide_the_step_of_one_process_in_order(
    length: int, per_rank: int, micro: int, world_size: int, start: int, seed: int
):
    per_rank *= micro
    data, total = Numbered(length), per_rank * world_size
    alone = step(BatchSampler(data, seed, total, None, 0, 1), start)
    parts = [BatchSampler(data, seed, total, micro, rank, world_size) for rank in range(world_size)]
    assert {part.num_micro for part in parts} == {per_rank // micro}
    assert all(len(b.images) == micro for b, _ in parts[0].micro_batches(start, CPU))
    assert [entry for part in parts for entry in step(part, start)] == alone
    # At each position of the run: the image at that position of the epoch's permutation.
    positions = (divmod(position, length) for position in range(start, start + total))
    assert alone == [[int(permutation(seed, epoch, length)[k]), epoch] for epoch, k in positions]


@pytest.mark.parametrize("world_size", [1, 2])
def test_overfitting_one_batch_repeats_the_same_images_with_new_draws(world_size: int):
    ranks = [
        BatchSampler(Numbered(300), 0, 8, None, r, world_size, True) for r in range(world_size)
    ]
    steps = [[e for rank in ranks for e in step(rank, start)] for start in (0, 8, 16)]
    for epoch, seen in enumerate(steps):
        assert sorted(seen) == [[image, epoch] for image in range(8)]


@pytest.mark.parametrize(
    "global_batch, micro_batch, world_size, named",
    [
        (10, None, 4, r"train\.global_batch 10 .* 4 processes: choose a multiple of 4"),
        (24, 5, 2, r"train\.micro_batch 5 does not divide the 12 images .* 24"),
        (24, 24, 2, r"train\.micro_batch 24 "),
    ],
)
def test_a_batch_that_cannot_be_divided_is_refused(
    global_batch: int, micro_batch: int | None, world_size: int, named: str
):
    with pytest.raises(UserError, match=named):
        BatchSampler(Numbered(50), 0, global_batch, micro_batch, 0, world_size)


def test_resident_images_are_the_same(tiny_shards: Path):
    data = Shards(tiny_shards)
    kept = BatchSampler(data, 0, 48, 12, 1, 2, resident=True)
    read = BatchSampler(data, 0, 48, 12, 1, 2, resident=False)
    for start in (0, 48, 304):  # the last one straddles two epochs
        for (one, draws), (other, others) in zip(
            kept.micro_batches(start, CPU), read.micro_batches(start, CPU), strict=True
        ):
            assert torch.equal(one.images, other.images) and one.images.dtype == torch.uint8
            assert torch.equal(one.labels, other.labels) and one.images_seen == start
            assert draws.index.tolist() == others.index.tolist()
            assert torch.equal(draws.normal("a", (3,)), others.normal("a", (3,)))


def test_the_order_of_a_large_set_is_computed_by_block(monkeypatch: pytest.MonkeyPatch):
    computed: list[tuple[int, int]] = []

    def count(seed: int, epoch: int, length: int, block: int) -> Tensor:
        computed.append((epoch, block))
        return permutation_block(seed, epoch, length, block)

    monkeypatch.setattr(sampler, "permutation_block", count)
    length = 2 * PERMUTATION_BLOCK + 10

    class Large(Numbered):
        def images(self, index: np.ndarray) -> np.ndarray:
            return super().images(index % 65536)

    made = BatchSampler(Large(length), 5, 16, None, 0, 1)
    expected = permutation(5, 0, length)
    positions = [0, PERMUTATION_BLOCK - 8, PERMUTATION_BLOCK, 2 * PERMUTATION_BLOCK, length - 8]
    for position in positions:
        ((_, draws),) = made.micro_batches(position, CPU)
        first = expected[position : position + 16].tolist()
        assert draws.index[: len(first)].tolist() == first
    # Two blocks where a batch straddles them, and none is computed twice in a row.
    assert computed == [(0, 0), (0, 1), (0, 2), (1, 0)]
