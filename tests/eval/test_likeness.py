"""Measures of how alike images are, against their formulas done slowly."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from dgm.eval.classifier import Classifier
from dgm.eval.likeness import feature_distance, psnr, ssim


def pair(noise: float = 0.2) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    a = torch.rand(2, 3, 16, 13) * 2 - 1
    return a, (a + noise * torch.randn_like(a)).clamp(-1, 1)


def test_psnr_of_a_known_error():
    a = torch.zeros(2, 3, 4, 4)
    b = torch.stack([torch.full((3, 4, 4), 0.2), torch.full((3, 4, 4), 2.0)])
    assert psnr(a, b).tolist() == pytest.approx([20.0, 0.0], abs=1e-6)  # of a range of 2
    assert math.isinf(psnr(a, a)[0])


def test_ssim_is_the_formula_place_by_place():
    a, b = (part.double().numpy() for part in pair())
    place = np.arange(11) - 5
    line = np.exp(-(place**2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    found = []
    for x, y in zip(a[0], b[0], strict=True):
        for i in range(16 - 10):
            for j in range(13 - 10):
                u, v = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
                mu, nu = (window * u).sum(), (window * v).sum()
                spread = (window * (u - mu) ** 2).sum() + (window * (v - nu) ** 2).sum()
                shared = (window * (u - mu) * (v - nu)).sum()
                top = (2 * mu * nu + c1) * (2 * shared + c2)
                found.append(top / ((mu**2 + nu**2 + c1) * (spread + c2)))
    made = ssim(*pair())
    assert float(made[0]) == pytest.approx(np.mean(found), rel=1e-9)
    assert ssim(*pair(0.0)).tolist() == pytest.approx([1, 1])


def test_distances_grow_with_noise():
    net = Classifier(10).eval()
    measured = []
    for noise in (0.0, 0.1, 0.3, 0.9):
        a, b = (part[..., :8].repeat(1, 1, 1, 4) for part in pair(noise))
        with torch.no_grad():
            measured.append(feature_distance(net, a, b))
    assert measured[0].tolist() == [0, 0]
    assert all((one < other).all() for one, other in itertools.pairwise(measured))


def test_distance_of_an_image_does_not_depend_on_the_others():
    net = Classifier(10).eval()
    a, b = (torch.nn.functional.pad(part, (0, 3)) for part in pair())
    with torch.no_grad():
        both, alone = feature_distance(net, a, b), feature_distance(net, a[1:], b[1:])
    torch.testing.assert_close(both[1:], alone)
