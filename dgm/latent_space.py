"""Paths and directions in a latent space, z [D] with the prior N(0, I)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from dgm.rng import Draws

_MIN_SINE = 1e-3  # below it, float32 cannot tell the angle from 0


def slerp_path(start: Tensor, end: Tensor, columns: int) -> Tensor:
    """Return spherical interpolations [B, columns, D] from each start to its end, both [B, D].

    Draws from the prior lie near a sphere, and so does the path (White 2016, "Sampling generative
    networks", section 2.1): (sin((1 - s) a) start + sin(s a) end) / sin(a) with the angle a between
    the two and s from 0 to 1. Linear where they are (anti)parallel.
    """
    line = lerp_path(start, end, columns)
    fraction = _fractions(columns, start)
    start, end = start[:, None], end[:, None]
    cosine = functional.cosine_similarity(start, end, dim=2)[:, :, None]
    angle = torch.arccos(cosine.clamp(-1, 1))
    arc = torch.sin((1 - fraction) * angle) * start + torch.sin(fraction * angle) * end
    return torch.where(torch.sin(angle) < _MIN_SINE, line, arc / torch.sin(angle))


def lerp_path(start: Tensor, end: Tensor, columns: int) -> Tensor:
    """Return linear interpolations [B, columns, D] from each start to its end, both [B, D]."""
    return torch.lerp(start[:, None], end[:, None], _fractions(columns, start))


def _fractions(columns: int, like: Tensor) -> Tensor:
    return torch.linspace(0, 1, columns, dtype=like.dtype, device=like.device)[None, :, None]


def traverse_directions(z: Tensor, directions: Tensor, columns: int, reach: float) -> Tensor:
    """Return copies of z [D], moved along each of K unit vectors [K, D]: [K, columns, D].

    The coordinate along the vector goes from -reach to reach; orthogonal components do not change.
    """
    steps = torch.linspace(-reach, reach, columns, dtype=z.dtype, device=z.device)[:, None]
    orthogonal = z - (directions @ z)[:, None] * directions
    return orthogonal[:, None] + steps * directions[:, None]


def jtj_product(decode: Callable[[Tensor], Tensor], z: Tensor, directions: Tensor) -> Tensor:
    """Return J'J v, [K, D], for each direction v [K, D], with J = d decode / dz at z [D].

    `decode` gets a batch of K copies of z.
    """
    repeated = z.repeat(len(directions), 1)
    tangents = torch.func.jvp(decode, (repeated,), (directions,))[1]
    return torch.func.vjp(decode, repeated)[1](tangents)[0]


def principal_directions(
    mean_product: Callable[[Tensor], Tensor],
    size: int,
    count: int,
    seed: int,
    iterations: int = 8,
) -> tuple[Tensor, Tensor]:
    """Return the directions in which images change most, unit vectors [count, D], and eigenvalues.

    They are the leading eigenvectors of the mean of J'J over latents (Ramesh et al. 2018, "A
    spectral regularizer for unsupervised disentanglement", section 3), by orthogonal iteration
    (Golub and Van Loan 2013, section 8.2.4). `mean_product` multiplies that mean by vectors
    [count, D]; an eigenvalue is the squared change of the image per unit of the direction.
    """
    start = Draws.of(seed, torch.arange(count)).normal("direction", (size,), torch.float64)
    basis = torch.linalg.qr(start.mT)[0]
    for _ in range(iterations):
        basis = torch.linalg.qr(mean_product(basis.mT).double().cpu().mT)[0]
    product = mean_product(basis.mT).double().cpu().mT
    # The eigenvectors within that subspace (Rayleigh-Ritz).
    projected = basis.mT @ product
    values, vectors = torch.linalg.eigh((projected + projected.mT) / 2)
    order = values.argsort(descending=True)
    directions = (basis @ vectors[:, order]).mT
    # The sign of an eigenvector is arbitrary: the largest entry is made positive.
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    return directions * largest.sign(), values[order]
