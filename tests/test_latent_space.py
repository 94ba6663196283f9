"""Paths through latents, and the directions in which images change most."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from dgm.latent_space import (
    jtj_product,
    lerp_path,
    principal_directions,
    slerp_path,
    traverse_directions,
)

DOUBLE = torch.float64


def test_slerp_keeps_its_radius_and_its_step():
    start, end = torch.randn(2, 3, 20, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    start, end = (5 * x / x.norm(dim=1, keepdim=True) for x in (start, end))
    path = slerp_path(start, end, 7)
    torch.testing.assert_close(path[:, 0], start)
    torch.testing.assert_close(path[:, -1], end)
    torch.testing.assert_close(path.norm(dim=2), torch.full((3, 7), 5.0, dtype=DOUBLE))
    steps = (path[:, 1:] - path[:, :-1]).norm(dim=2)
    torch.testing.assert_close(steps, steps[:, :1].expand_as(steps))


@pytest.mark.parametrize("end", [[1.0, 2.0], [3.0, 6.0], [-1.0, -2.0]])
def test_slerp_is_linear_where_there_is_no_arc(end: list[float]):
    start = torch.tensor([[1.0, 2.0]])
    path = slerp_path(start, torch.tensor([end]), 5)
    fraction = torch.linspace(0, 1, 5)[:, None]
    torch.testing.assert_close(path[0], torch.lerp(start, torch.tensor(end), fraction))


def test_lerp_steps_are_even():
    start, end = torch.tensor([[0.0, 4.0]]), torch.tensor([[2.0, 0.0]])
    assert lerp_path(start, end, 3).tolist() == [[[0, 4], [1, 2], [2, 0]]]


def test_only_the_coordinate_along_a_direction_moves():
    z = torch.tensor([1.0, 2.0, 3.0], dtype=DOUBLE)
    directions = torch.tensor([[0.0, 1.0, 0.0], [0.6, 0.0, 0.8]], dtype=DOUBLE)
    path = traverse_directions(z, directions, 3, reach=2.0)
    assert path[0].tolist() == [[1, -2, 3], [1, 0, 3], [1, 2, 3]]
    torch.testing.assert_close(path[1] @ directions[1], torch.tensor([-2.0, 0, 2], dtype=DOUBLE))
    torch.testing.assert_close(path[1, :, 1], torch.full((3,), 2.0, dtype=DOUBLE))


def test_principal_directions_are_the_singular_vectors_of_a_linear_decoder():
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.standard_normal((n, n)))[0] for n in (30, 12))
    sizes = np.array([9, 5, 3, 1, 0.5, *[0.1] * 7])
    matrix = torch.from_numpy(left[:, :12] * sizes @ right.T)

    def decode(z: Tensor) -> Tensor:
        return (z @ matrix.mT).unflatten(1, (3, 10))

    z = torch.zeros(12, dtype=DOUBLE)
    found, values = principal_directions(
        lambda v: jtj_product(decode, z, v), size=12, count=3, seed=0, iterations=20
    )
    torch.testing.assert_close(values, torch.from_numpy(sizes[:3] ** 2), rtol=1e-9, atol=0)
    overlap = (found @ torch.from_numpy(right[:, :3])).abs()
    torch.testing.assert_close(overlap, torch.eye(3, dtype=DOUBLE), rtol=0, atol=1e-7)


def test_jtj_product_agrees_with_the_jacobian():
    weight = torch.randn(6, 4, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))

    def decode(z: Tensor) -> Tensor:
        return (z @ weight.mT).tanh()

    z, directions = torch.randn(4, dtype=DOUBLE), torch.randn(3, 4, dtype=DOUBLE)
    jacobian = torch.autograd.functional.jacobian(lambda x: decode(x[None])[0], z)
    found = jtj_product(decode, z, directions)
    torch.testing.assert_close(found, directions @ jacobian.mT @ jacobian)
