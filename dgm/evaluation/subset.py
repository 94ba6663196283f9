"""Which test images are looked at."""

from __future__ import annotations

import numpy as np

from dgm.rng import permutation


def in_turn(labels: np.ndarray, count: int, seed: int, run: int = 1) -> np.ndarray:
    """Choose `count` images by number, of each class in turn, in an order of the seed.

    With `run` so many of a class follow each other, and a class gives whole runs only.
    """
    order = permutation(seed, 0, len(labels)).numpy()
    rank = np.empty(len(order), dtype=np.int64)  # of an image among those of its class
    whole = np.empty(len(order), dtype=bool)
    for label in np.unique(labels):
        of_class = order[labels[order] == label]
        rank[of_class] = np.arange(len(of_class))
        whole[of_class] = rank[of_class] < len(of_class) // run * run
    chosen = np.lexsort((rank, labels, rank // run))
    return chosen[whole[chosen]][:count]
