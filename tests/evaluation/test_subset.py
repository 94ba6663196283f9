"""Test images come of each class in turn."""

from __future__ import annotations

import numpy as np

from dgm.evaluation.subset import in_turn

LABELS = np.repeat(np.arange(4), [5, 2, 9, 4])


def test_classes_come_in_turn():
    chosen = in_turn(LABELS, 10, seed=0)
    assert LABELS[chosen].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 2]
    assert len(set(chosen.tolist())) == 10
    assert in_turn(LABELS, 10, seed=1).tolist() != chosen.tolist()


def test_pairs_are_of_one_class_and_whole():
    chosen = in_turn(LABELS, 100, seed=0, run=2)
    assert LABELS[chosen].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 0, 0, 2, 2, 3, 3, 2, 2, 2, 2]
    assert len(set(chosen.tolist())) == len(chosen)
