"""Ways through a space of latents z [D] whose prior is N(0, 1) in each dimension."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from dgm.rng import Draws

_NEARLY_ONE_WAY = 1e-3  # sine of an angle that float32 can hardly tell from 0


def along_sphere(start: Tensor, end: Tensor, columns: int) -> Tensor:
    """Go from each start to its end [B, D] in equal steps of the angle: [B, columns, D].

    Draws from the prior lie near a sphere, and the way keeps near it (White 2016, "Sampling
    generative networks", section 2.1): (sin((1 - s) a) start + sin(s a) end) / sin(a). Where the
    two point the same way or opposite ones, the way is a line.
    """
    line = along_line(start, end, columns)
    share = torch.linspace(0, 1, columns, dtype=start.dtype, device=start.device)[None, :, None]
    start, end = start[:, None], end[:, None]
    cosine = functional.cosine_similarity(start, end, dim=2)[:, :, None]
    angle = torch.arccos(cosine.clamp(-1, 1))
    arc = torch.sin((1 - share) * angle) * start + torch.sin(share * angle) * end
    straight = torch.sin(angle) < _NEARLY_ONE_WAY
    return torch.where(straight, line, arc / torch.sin(angle))


def along_line(start: Tensor, end: Tensor, columns: int) -> Tensor:
    """Go from each start to its end [B, D] in equal steps: [B, columns, D]."""
    share = torch.linspace(0, 1, columns, dtype=start.dtype, device=start.device)[None, :, None]
    return torch.lerp(start[:, None], end[:, None], share)


def along_directions(z: Tensor, directions: Tensor, columns: int, reach: float) -> Tensor:
    """Move the coordinate of z [D] along each unit vector [K, D] from -reach to reach.

    What lies across the direction stays: [K, columns, D].
    """
    steps = torch.linspace(-reach, reach, columns, dtype=z.dtype, device=z.device)[:, None]
    across = z - (directions @ z)[:, None] * directions
    return across[:, None] + steps * directions[:, None]


def pull_back(decode: Callable[[Tensor], Tensor], z: Tensor, directions: Tensor) -> Tensor:
    """Compute J'J v at z [D] for each direction v [K, D]: [K, D]; J = d decode / dz.

    `decode` gets z as a batch of K.
    """
    same = z.repeat(len(directions), 1)
    moved = torch.func.jvp(decode, (same,), (directions,))[1]
    return torch.func.vjp(decode, same)[1](moved)[0]


def principal_directions(
    pulled: Callable[[Tensor], Tensor], size: int, count: int, seed: int, iterations: int = 8
) -> tuple[Tensor, Tensor]:
    """Find the directions in which images change most: unit vectors [count, D] and eigenvalues.

    They are the leading eigenvectors of the mean of J'J over latents (Ramesh et al. 2018, "A
    spectral regularizer for unsupervised disentanglement", section 3), by orthogonal iteration
    (Golub and Van Loan 2013, section 8.2.4). `pulled` computes that mean's product with vectors
    [count, D]; an eigenvalue is the squared change of the image for a unit of the direction.
    """
    start = Draws.of(seed, torch.arange(count)).normal("direction", (size,), torch.float64)
    basis = torch.linalg.qr(start.mT)[0]
    for _ in range(iterations):
        basis = torch.linalg.qr(pulled(basis.mT).double().cpu().mT)[0]
    moved = pulled(basis.mT).double().cpu().mT
    # Within the space that was found, the eigenvectors themselves (Rayleigh and Ritz).
    within = basis.mT @ moved
    values, vectors = torch.linalg.eigh((within + within.mT) / 2)
    order = values.argsort(descending=True)
    found = (basis @ vectors[:, order]).mT
    largest = found.gather(1, found.abs().argmax(1, keepdim=True))
    return found * largest.sign(), values[order]  # an eigenvector's sign is anyone's choice
