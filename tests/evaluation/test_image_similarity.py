"""Distance of images in a classifier's features; SSIM and PSNR: tests/references."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from dgm.evaluation.classifier import Classifier
from dgm.evaluation.image_similarity import feature_distance


def pair(noise: float = 0.2) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    a = torch.rand(2, 3, 16, 13) * 2 - 1
    return a, (a + noise * torch.randn_like(a)).clamp(-1, 1)


def test_distances_grow_with_noise():
    net = Classifier(10).eval()
    distances = []
    for noise in (0.0, 0.1, 0.3, 0.9):
        a, b = (part[..., :8].repeat(1, 1, 1, 4) for part in pair(noise))
        with torch.no_grad():
            distances.append(feature_distance(net, a, b))
    assert distances[0].tolist() == [0, 0]
    assert all((one < other).all() for one, other in itertools.pairwise(distances))


def test_distance_of_an_image_does_not_depend_on_the_others():
    net = Classifier(10).eval()
    a, b = (torch.nn.functional.pad(part, (0, 3)) for part in pair())
    with torch.no_grad():
        both, alone = feature_distance(net, a, b), feature_distance(net, a[1:], b[1:])
    torch.testing.assert_close(both[1:], alone)
