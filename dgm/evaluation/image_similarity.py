"""Similarity of pairs of images a and b [B, C, H, W], each [B]."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from dgm.evaluation.classifier import Classifier

_RANGE = 255.0  # from black to white
_WINDOW, _WINDOW_SIGMA = 11, 1.5
MIN_SIDE = _WINDOW  # smallest image side for SSIM
_K = (0.01, 0.03)


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio 10 log10(L^2 / MSE), in dB; inf if identical.

    a, b: pixel values in [0, 255], L = 255.
    """
    error = (a.double() - b.double()).square().mean((1, 2, 3))
    return 10 * torch.log10(_RANGE**2 / error)


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Return the structural similarity (Wang et al. 2004, equation 13), 1 for identical images.

    a, b: pixel values in [0, 255] with black 0, as the luminance factor
    (2 mu_a mu_b + C1) / (mu_a^2 + mu_b^2 + C1) depends on the origin. 11 x 11 Gaussian window of
    sigma 1.5 and K = (0.01, 0.03), as in the paper; the mean over channels and over positions where
    the window lies within the image. H and W must be at least MIN_SIDE.
    """
    channels = a.shape[1]
    offset = torch.arange(_WINDOW, dtype=torch.float64, device=a.device) - _WINDOW // 2
    gaussian = torch.exp(-(offset**2) / (2 * _WINDOW_SIGMA**2))
    window = torch.outer(gaussian, gaussian) / gaussian.sum() ** 2
    kernel = window.expand(channels, 1, _WINDOW, _WINDOW)

    def mean(x: Tensor) -> Tensor:
        return functional.conv2d(x, kernel, groups=channels)

    a, b = a.double(), b.double()
    mean_a, mean_b = mean(a), mean(b)
    variance_a, variance_b = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2
    covariance = mean(a * b) - mean_a * mean_b
    c1, c2 = ((k * _RANGE) ** 2 for k in _K)
    numerator = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    denominator = (mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2)
    return (numerator / denominator).mean((1, 2, 3))


@torch.no_grad()
def feature_distance(net: Classifier, a: Tensor, b: Tensor) -> Tensor:
    """Return the distance of a and b in a classifier's features, 0 if identical.

    a, b: images of preprocessing.STANDARD. LPIPS (Zhang et al. 2018, equation 1) without its
    learned weights: squared difference of features scaled to unit length at every position,
    averaged over positions and stages.
    """

    def unit_features(x: Tensor) -> list[Tensor]:
        return [functional.normalize(features, dim=1) for features in net.stage_features(x)]

    stages = [
        (one - other).square().sum(1).mean((1, 2))
        for one, other in zip(unit_features(a), unit_features(b), strict=True)
    ]
    return torch.stack(stages).mean(0)
