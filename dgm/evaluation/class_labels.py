"""Labels of generated images, and class-balanced subsets of real ones."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dgm.rng import permutation
from dgm.training.device_loader import Images

BY_FREQUENCY = "by the training data's frequencies"
UNIFORM = "uniform"


def count_classes(data: Images, num_classes: int) -> np.ndarray:
    """Return the number of images of each class: int64 [num_classes]."""
    return np.bincount(data.labels(np.arange(len(data))), minlength=num_classes)


def is_balanced(counts: np.ndarray) -> bool:
    """Return whether all classes that occur are equally frequent."""
    present = counts[counts > 0]
    return bool((present == present[0]).all())


def uniform_labels(count: int, counts: np.ndarray) -> Tensor:
    """Return `count` labels that cycle through the classes that occur: int64 [count]."""
    present = torch.from_numpy(np.flatnonzero(counts))
    return present[torch.arange(count) % len(present)]


def labels_by_frequency(count: int, counts: np.ndarray) -> Tensor:
    """Return `count` labels as frequent as the classes of `counts` [classes]: int64 [count].

    Allocated by largest remainders (the lower label first where they are equal), and each class
    spread evenly over the labels. Equally frequent classes are cycled through.
    """
    if is_balanced(counts):
        return uniform_labels(count, counts)
    counts = counts.astype(object)  # Python ints: the product may exceed 64 bits
    quotas = count * counts
    allocated = (quotas // counts.sum()).astype(np.int64)
    remainders = quotas % counts.sum()
    order = sorted(range(len(counts)), key=lambda label: (-remainders[label], label))
    allocated[order[: count - int(allocated.sum())]] += 1
    labels = np.repeat(np.arange(len(counts)), allocated)
    rank = np.concatenate([np.arange(n) for n in allocated])
    # The k-th of n labels of a class lies at (k + 1/2) / n of the whole.
    position = (rank + 0.5) / allocated[labels]
    return torch.from_numpy(labels[np.lexsort((labels, position))])


def balanced_subset(labels: np.ndarray, count: int, seed: int, run: int = 1) -> np.ndarray:
    """Return the rows of up to `count` images, taken from the classes in turn.

    The order of the images of a class depends on `seed`. A class gives `run` images each time, and
    none once it has fewer left.
    """
    order = permutation(seed, 0, len(labels)).numpy()
    rank = np.empty(len(order), dtype=np.int64)  # an image's position among those of its class
    complete = np.empty(len(order), dtype=bool)
    for label in np.unique(labels):
        of_class = order[labels[order] == label]
        rank[of_class] = np.arange(len(of_class))
        complete[of_class] = rank[of_class] < len(of_class) // run * run
    rows = np.lexsort((rank, labels, rank // run))
    return rows[complete[rows]][:count]
