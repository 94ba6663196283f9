"""Labels of generated images, as frequent as the data's or uniform, and balanced subsets."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from array_images import ArrayImages
from hypothesis import given
from hypothesis import strategies as st

from dgm.evaluation.class_labels import (
    balanced_subset,
    count_classes,
    is_balanced,
    labels_by_frequency,
    uniform_labels,
)

SUBSET_LABELS = np.repeat(np.arange(4), [5, 2, 9, 4])


@given(classes=st.integers(1, 12), each=st.integers(1, 9), count=st.integers(0, 60))
def test_balanced_data_cycle_through_the_classes(classes: int, each: int, count: int) -> None:
    counts = np.full(classes, each)
    assert torch.equal(labels_by_frequency(count, counts), torch.arange(count) % classes)
    assert is_balanced(counts)


@given(counts=st.lists(st.integers(0, 40), min_size=1, max_size=8), count=st.integers(1, 300))
def test_labels_follow_the_frequencies(counts: list[int], count: int) -> None:
    counts[0] += 1
    frequencies = np.array(counts) / sum(counts)
    labels = labels_by_frequency(count, np.array(counts)).numpy()
    found = np.bincount(labels, minlength=len(counts))
    assert len(labels) == count and (found[np.array(counts) == 0] == 0).all()
    assert (np.abs(found - count * frequencies) < 1).all()  # largest remainders
    if is_balanced(np.array(counts)):
        return
    for end in range(1, count):  # any prefix has about these frequencies
        prefix = np.bincount(labels[:end], minlength=len(counts))
        assert (np.abs(prefix - end * found / count) <= len(counts) / 2 + 1).all()


def test_largest_remainders_by_hand() -> None:
    # Of 5 labels 2.5, 1.5 and 1: where remainders are equal, the lower label gets one more.
    labels = labels_by_frequency(5, np.array([5, 3, 2]))
    assert torch.bincount(labels).tolist() == [3, 1, 1]
    assert labels.tolist() == [0, 0, 1, 2, 0]
    assert torch.equal(labels_by_frequency(5, np.array([5, 3, 2])), labels)


def test_classes_without_images_get_no_labels() -> None:
    counts = np.array([0, 4, 0, 9])
    assert uniform_labels(5, counts).tolist() == [1, 3, 1, 3, 1]
    assert set(labels_by_frequency(13, counts).tolist()) == {1, 3}
    assert is_balanced(np.array([0, 4, 4]))


def test_huge_data_do_not_overflow() -> None:
    counts = np.array([2**40, 2**41])
    assert torch.bincount(labels_by_frequency(900_000, counts)).tolist() == [300_000, 600_000]


@pytest.mark.parametrize("count", [1, 70_000])
def test_images_of_each_class_are_counted(count: int) -> None:
    data = ArrayImages(np.empty((count, 0)), np.arange(count) % 3)
    expected = [*(len(range(label, count, 3)) for label in range(3)), 0]
    assert count_classes(data, 4).tolist() == expected


def test_subsets_cycle_through_the_classes() -> None:
    rows = balanced_subset(SUBSET_LABELS, 10, seed=0)
    assert SUBSET_LABELS[rows].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 2]
    assert len(set(rows.tolist())) == 10
    assert balanced_subset(SUBSET_LABELS, 10, seed=1).tolist() != rows.tolist()


def test_pairs_are_of_one_class_and_complete() -> None:
    rows = balanced_subset(SUBSET_LABELS, 100, seed=0, run=2)
    expected = [0, 0, 1, 1, 2, 2, 3, 3, 0, 0, 2, 2, 3, 3, 2, 2, 2, 2]
    assert SUBSET_LABELS[rows].tolist() == expected
    assert len(set(rows.tolist())) == len(rows)
