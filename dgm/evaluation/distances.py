"""Distances between two sets of images in features of a net, and a score of one by its classes.

The Frechet distance has a file of its own, frechet.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dgm.rng import permutation

KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000  # as torch-fidelity's defaults
SCORE_SPLITS = 10


def squared_mmd(a: Tensor, b: Tensor) -> float:
    """Estimate the squared maximum mean discrepancy of features a and b [N, D], without bias.

    With the kernel (x.y / D + 1)^3, as KID has it (Binkowski et al. 2018, section 4). Computed in
    float64; N is at least 2. Near 0 for sets of one distribution, on either side of it.
    """
    a, b = a.double(), b.double()
    count = len(a)

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    # Of an image with itself nothing is counted.
    within = sum((k := kernel(x, x)).sum() - k.diagonal().sum() for x in (a, b))
    return float(within / (count * (count - 1)) - 2 * kernel(a, b).mean())


def kernel_distance(
    a: Tensor, b: Tensor, seed: int, subsets: int = KID_SUBSETS, size: int = KID_SUBSET_SIZE
) -> float:
    """Average `squared_mmd` over random subsets of features a [M, D] and b [N, D].

    In Inception's features it is the KID. Subsets have `size` images, or as many as there are.
    """
    size = min(size, len(a), len(b))
    if size == len(a) == len(b):
        subsets = 1  # there is one such subset
    found = []
    for k in range(subsets):
        rows = [permutation(seed, 2 * k + n, len(x))[:size] for n, x in enumerate((a, b))]
        found.append(squared_mmd(a[rows[0]], b[rows[1]]))
    return float(torch.tensor(found, dtype=torch.float64).mean())


def class_score(logits: Tensor, splits: int = SCORE_SPLITS) -> float:
    """Compute exp(E KL(p(y | x) || p(y))) (Salimans et al. 2016, section 4) of logits [N, classes].

    The mean over `splits` equal parts, in the order given. By Inception's classes it is the
    Inception score. From 1 to the number of classes, which sure and evenly spread classes reach.
    """
    logits, scores = logits.double(), []
    for k in range(splits):
        part = logits[k * len(logits) // splits : (k + 1) * len(logits) // splits]
        log_p = part.log_softmax(1)
        p = log_p.exp()
        scores.append((p * (log_p - p.mean(0).log())).sum(1).mean().exp())
    return float(torch.stack(scores).mean())
