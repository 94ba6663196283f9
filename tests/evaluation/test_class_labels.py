"""Classes of generated images: as frequent as the data's, and evenly spread."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dgm.evaluation.class_labels import (
    count_classes,
    is_balanced,
    labels_by_frequency,
    uniform_labels,
)
from dgm.evaluation.online_eval import EvalConfig, RealImages, make_evaluation
from dgm.objective import Nets
from dgm.preprocessing import STANDARD
from dgm.rng import Draws
from dgm.training.engine import Engine


@given(classes=st.integers(1, 12), each=st.integers(1, 9), count=st.integers(0, 60))
def test_balanced_data_give_the_classes_in_turn(classes: int, each: int, count: int) -> None:
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
    for end in range(1, count):  # a prefix is near what it would be of all
        prefix = np.bincount(labels[:end], minlength=len(counts))
        assert (np.abs(prefix - end * found / count) <= len(counts) / 2 + 1).all()


def test_largest_remainders_by_hand() -> None:
    # Quotas of 5: 2.5, 1.5, 1: the remainder goes to the lower label.
    labels = labels_by_frequency(5, np.array([5, 3, 2]))
    assert torch.bincount(labels).tolist() == [3, 1, 1]
    assert labels.tolist() == [0, 0, 1, 2, 0]
    assert torch.equal(labels_by_frequency(5, np.array([5, 3, 2])), labels)


def test_classes_without_images_are_not_asked_for() -> None:
    counts = np.array([0, 4, 0, 9])
    assert uniform_labels(5, counts).tolist() == [1, 3, 1, 3, 1]
    assert set(labels_by_frequency(13, counts).tolist()) == {1, 3}
    assert is_balanced(np.array([0, 4, 4]))


def test_huge_data_do_not_overflow() -> None:
    counts = np.array([2**40, 2**41])
    assert torch.bincount(labels_by_frequency(900_000, counts)).tolist() == [300_000, 600_000]


@pytest.mark.parametrize("count", [1, 70_000])
def test_images_of_each_class_are_counted(count: int) -> None:
    class Data:
        def __len__(self) -> int:
            return count

        def images(self, index: np.ndarray) -> np.ndarray:
            raise AssertionError("only labels are read")

        def labels(self, index: np.ndarray) -> np.ndarray:
            return index % 3

    expected = [len(range(label, count, 3)) for label in range(4)]
    expected[3] = 0
    assert count_classes(Data(), 4).tolist() == expected


@pytest.mark.slow
def test_what_is_measured_as_a_run_goes_follows_the_frequencies(
    engine: Engine, tmp_path: Path
) -> None:
    class Data:
        def __len__(self) -> int:
            return 60

        def images(self, index: np.ndarray) -> np.ndarray:
            rows = [np.random.default_rng(i).integers(0, 256, (8, 8, 3), np.uint8) for i in index]
            return np.stack(rows)

        def labels(self, index: np.ndarray) -> np.ndarray:
            return np.where(index < 45, 2, 0)

    class Recording:
        num_classes, sample_config, pixels = 3, SimpleNamespace(batch=100), STANDARD
        seen: ClassVar[list[int]] = []

        def sample(self, nets: Nets, count: int, labels: Tensor, draws: Draws) -> Tensor:
            self.seen.extend(labels.tolist())
            return draws.normal("x", (3, 8, 8)).clamp(-1, 1)

    objective: Any = Recording()
    data = Data()
    real = RealImages(data, 3, "few", lambda: data)
    config = EvalConfig(every_images=1, num_images=20)
    measure = make_evaluation(config, objective, engine, real, tmp_path)
    assert measure is not None
    assert measure({})["eval/fd_classifier"] > 0
    assert objective.seen == labels_by_frequency(20, np.array([15, 0, 45])).tolist()
    assert np.bincount(objective.seen).tolist() == [5, 0, 15]
