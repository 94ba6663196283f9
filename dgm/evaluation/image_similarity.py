"""How alike images are, pair by pair: of a and b [B, C, H, W], each [B]."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from dgm.evaluation.classifier import Classifier

_RANGE = 255.0  # from black to white
_WINDOW, _WINDOW_SIGMA = 11, 1.5
SMALLEST = _WINDOW  # side of an image
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
    the window lies within the image. H and W must be at least SMALLEST.
    """
    channels = a.shape[1]
    place = torch.arange(_WINDOW, dtype=torch.float64, device=a.device) - _WINDOW // 2
    line = torch.exp(-(place**2) / (2 * _WINDOW_SIGMA**2))
    window = torch.outer(line, line) / line.sum() ** 2
    kernel = window.expand(channels, 1, _WINDOW, _WINDOW)

    def mean(x: Tensor) -> Tensor:
        return functional.conv2d(x, kernel, groups=channels)

    a, b = a.double(), b.double()
    mean_a, mean_b = mean(a), mean(b)
    spread_a, spread_b = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2
    shared = mean(a * b) - mean_a * mean_b
    c1, c2 = ((k * _RANGE) ** 2 for k in _K)
    same = (2 * mean_a * mean_b + c1) * (2 * shared + c2)
    whole = (mean_a**2 + mean_b**2 + c1) * (spread_a + spread_b + c2)
    return (same / whole).mean((1, 2, 3))


@torch.no_grad()
def feature_distance(net: Classifier, a: Tensor, b: Tensor) -> Tensor:
    """Measure how differently a classifier sees a and b (pixels.STANDARD), 0 for identical images.

    As LPIPS (Zhang et al. 2018, equation 1) without its learned weights: at each stage features of
    unit length at every place, their squared difference, the mean over places and stages.
    """
    stages = [
        (one - other).square().sum(1).mean((1, 2))
        for one, other in zip(_directions(net, a), _directions(net, b), strict=True)
    ]
    return torch.stack(stages).mean(0)


def _directions(net: Classifier, x: Tensor) -> list[Tensor]:
    return [functional.normalize(seen, dim=1) for seen in net.levels(x)]
