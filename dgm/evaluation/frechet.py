"""The Frechet distance between two sets of images, in the features of a net."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Mean [D] and covariance [D, D] of features, float64."""

    mean: np.ndarray
    covariance: np.ndarray

    @staticmethod
    def of(features: Tensor) -> Moments:
        """Measure features [N, D]; N is at least 2."""
        values = features.double().cpu().numpy()
        return Moments(values.mean(0), np.cov(values, rowvar=False).reshape(2 * values.shape[1:]))


def frechet_distance(a: Moments, b: Moments) -> float:
    """Compute |mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) (Heusel et al. 2017, section 2).

    The trace of the root is the sum of the singular values of C_a^(1/2) C_b^(1/2).
    """
    roots = [_root(m.covariance) for m in (a, b)]
    shared = np.linalg.svd(roots[0] @ roots[1], compute_uv=False).sum()
    spread = np.trace(a.covariance) + np.trace(b.covariance) - 2 * shared
    return float(((a.mean - b.mean) ** 2).sum() + spread)


def _root(covariance: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(covariance)
    # Rounding leaves eigenvalues of a singular matrix a little below zero.
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
