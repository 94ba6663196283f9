"""Which classes are asked for where generated images are compared with real ones."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dgm.training.device_loader import Images

BY_FREQUENCY = "by the training data's frequencies"
UNIFORM = "uniform"
_AT_ONCE = 1 << 16  # labels that are read at once


def count_classes(data: Images, num_classes: int) -> np.ndarray:
    """Count the images of each class: int64 [num_classes]."""
    counts = np.zeros(num_classes, np.int64)
    for start in range(0, len(data), _AT_ONCE):
        rows = np.arange(start, min(start + _AT_ONCE, len(data)))
        counts += np.bincount(data.labels(rows), minlength=num_classes)
    return counts


def is_balanced(counts: np.ndarray) -> bool:
    """Return whether all classes that occur are equally frequent."""
    present = counts[counts > 0]
    return bool((present == present[0]).all())


def uniform_labels(count: int, counts: np.ndarray) -> Tensor:
    """Return `count` labels, the classes that occur in turn: int64 [count]."""
    present = torch.from_numpy(np.flatnonzero(counts))
    return present[torch.arange(count) % len(present)]


def labels_by_frequency(count: int, counts: np.ndarray) -> Tensor:
    """Return `count` labels as frequent as the classes of `counts` [classes]: int64 [count].

    Allocated by largest remainders (the lower label first where they are equal), and each class
    spread evenly over the labels. Where all classes are equally frequent, they come in turn.
    """
    if is_balanced(counts):
        return uniform_labels(count, counts)
    counts = counts.astype(object)  # exact: the product passes 64 bits for huge data
    quotas = count * counts
    given = (quotas // counts.sum()).astype(np.int64)
    remainders = quotas % counts.sum()
    order = sorted(range(len(counts)), key=lambda label: (-remainders[label], label))
    given[order[: count - int(given.sum())]] += 1
    labels = np.repeat(np.arange(len(counts)), given)
    within = np.concatenate([np.arange(n) for n in given])
    # The k-th of n of a class has its place at (k + 1/2) / n of all.
    places = (within + 0.5) / given[labels]
    return torch.from_numpy(labels[np.lexsort((labels, places))])
