"""Distances between two sets of images in features of a net, and the Inception score of one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dgm.rng import permutation

KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000  # defaults of torch-fidelity
SCORE_SPLITS = 10


@dataclass(frozen=True)
class FeatureStatistics:
    """Mean [D] and unbiased covariance [D, D] of features, float64."""

    mean: np.ndarray
    covariance: np.ndarray

    @staticmethod
    def from_features(features: Tensor) -> FeatureStatistics:
        """Return the statistics of features [N, D]; N is at least 2."""
        values = features.double().cpu().numpy()
        covariance = np.cov(values, rowvar=False).reshape(2 * values.shape[1:])
        return FeatureStatistics(values.mean(0), covariance)


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Return |mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) (Heusel et al. 2017, section 2).

    The trace of the root is the sum of the singular values of C_a^(1/2) C_b^(1/2).
    """
    roots = [_matrix_root(statistics.covariance) for statistics in (a, b)]
    trace_of_root = np.linalg.svd(roots[0] @ roots[1], compute_uv=False).sum()
    traces = np.trace(a.covariance) + np.trace(b.covariance) - 2 * trace_of_root
    return float(((a.mean - b.mean) ** 2).sum() + traces)


def _matrix_root(covariance: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(covariance)
    # Rounding leaves eigenvalues of a singular matrix a little below zero.
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T


def squared_mmd(a: Tensor, b: Tensor) -> float:
    """Return the unbiased estimate of the squared maximum mean discrepancy of a and b, both [N, D].

    Kernel (x.y / D + 1)^3, as for KID (Binkowski et al. 2018, section 4), in float64; N is at
    least 2. Near 0, positive or negative, for samples of one distribution.
    """
    a, b = a.double(), b.double()
    count = len(a)

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    within = sum((k := kernel(x, x)).sum() - k.diagonal().sum() for x in (a, b))
    return float(within / (count * (count - 1)) - 2 * kernel(a, b).mean())


def kernel_distance(
    a: Tensor, b: Tensor, seed: int, subsets: int = KID_SUBSETS, size: int = KID_SUBSET_SIZE
) -> float:
    """Return the mean of `squared_mmd` over random subsets of features a [M, D] and b [N, D].

    In Inception's features it is the KID. Subsets have `size` images, or all if there are fewer.
    """
    size = min(size, len(a), len(b))
    if size == len(a) == len(b):
        subsets = 1  # all subsets would be the same
    estimates = []
    for k in range(subsets):
        rows = [permutation(seed, 2 * k + n, len(x))[:size] for n, x in enumerate((a, b))]
        estimates.append(squared_mmd(a[rows[0]], b[rows[1]]))
    return float(torch.tensor(estimates, dtype=torch.float64).mean())


def class_score(logits: Tensor, splits: int = SCORE_SPLITS) -> float:
    """Return exp(E KL(p(y | x) || p(y))) (Salimans et al. 2016, section 4) of logits [N, classes].

    The mean over `splits` equal parts, in the order given. With Inception's classes it is the
    Inception score. It lies between 1 and the number of classes, which it reaches if predictions
    are certain and classes equally frequent.
    """
    logits, scores = logits.double(), []
    for k in range(splits):
        part = logits[k * len(logits) // splits : (k + 1) * len(logits) // splits]
        log_p = part.log_softmax(1)
        p = log_p.exp()
        scores.append((p * (log_p - p.mean(0).log())).sum(1).mean().exp())
    return float(torch.stack(scores).mean())
