"""How two sets of images overlap, by nearest neighbours in features of a net."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dgm.training.engine import Engine

PRECISION_NEIGHBOURS = 3  # of Kynkaanniemi et al. 2019
COVERAGE_NEIGHBOURS = 5  # of Naeem et al. 2020
_TIE = 1e-9  # relative difference up to which distances are equal: they are rounded at 1e-12
_AT_ONCE = 2**25  # distances that are held in memory
_RESOLUTION = 1e-12  # of squared distances, relative to the vectors' squared norms
_BLOCK = 10_000  # images that are looked through at once


def overlap(engine: Engine, made: Tensor, real: Tensor) -> dict[str, float]:
    """Compare generated features [M, D] with real ones [N, D], as many where it can be.

    precision: fraction of generated images in the ball around any real one, whose radius is the
    distance to its third neighbour; recall: the same with the sets exchanged (Kynkaanniemi et al.
    2019, equations 1 to 3, where the ball is closed). density: number of balls around real images,
    out to their fifth neighbour, that a generated image lies in, over five; coverage: fraction of
    these balls that hold any (Naeem et al. 2020, equations 2 and 3; their code, package prdc, has
    open balls).

    For two sets of one distribution density is 1 and coverage 1 - 2^-5 = 0.97 on average, whatever
    the distribution; precision and recall are below 1 by an amount that depends on it. For a set
    against itself all four are 1 (density: if its images differ). Collective: call on all ranks.
    """
    made, real = made.to(engine.device), real.to(engine.device)
    near_real = radii(engine, real, PRECISION_NEIGHBOURS)
    near_made = radii(engine, made, PRECISION_NEIGHBOURS)
    wide_real = radii(engine, real, COVERAGE_NEIGHBOURS)

    def of_made(rows: Tensor) -> Tensor:
        parts = [
            torch.stack(
                [in_closed_ball(d, near_real).any(1), in_open_ball(d, wide_real).sum(1)], dim=1
            )
            for d in distances(made[rows], real)
        ]
        return torch.cat(parts).double()

    def of_real(rows: Tensor) -> Tensor:
        own, first, parts = wide_real[rows], 0, []
        for d in distances(real[rows], made):
            reach = own[first : first + len(d)]
            covered = in_open_ball(d.min(1).values, reach)
            parts.append(torch.stack([in_closed_ball(d, near_made).any(1), covered], dim=1))
            first += len(d)
        return torch.cat(parts).double()

    precision, balls = engine.map_rows(len(made), of_made).mean(0).tolist()
    recall, coverage = engine.map_rows(len(real), of_real).mean(0).tolist()
    density = balls / COVERAGE_NEIGHBOURS
    return {"precision": precision, "recall": recall, "density": density, "coverage": coverage}


def in_closed_ball(distance: Tensor, radius: Tensor) -> Tensor:
    """Return where distance <= radius, counting those equal up to rounding as inside."""
    return distance <= radius * (1 + _TIE)


def in_open_ball(distance: Tensor, radius: Tensor) -> Tensor:
    """Return where distance < radius, counting those equal up to rounding as outside."""
    return distance < radius * (1 - _TIE)


def radii(engine: Engine, features: Tensor, neighbours: int) -> Tensor:
    """Measure how far the k-th neighbour of each image lies in its own set [N, D]: [N]."""

    features = features.to(engine.device)

    def measure(rows: Tensor) -> Tensor:
        # Its nearest is the image itself.
        parts = [d.kthvalue(neighbours + 1).values for d in distances(features[rows], features)]
        return torch.cat(parts)

    return engine.map_rows(len(features), measure)


def nearest(engine: Engine, queries: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
    """Find the nearest of base [N, D] to each query [M, D]: distances and rows, each [M]."""

    def measure(rows: Tensor) -> Tensor:
        own = queries[rows].to(engine.device)
        found = torch.full((len(rows), 2), torch.inf, dtype=torch.float64, device=engine.device)
        for first, block in zip(range(0, len(base), _BLOCK), base.split(_BLOCK), strict=True):
            here = [d.min(dim=1) for d in distances(own, block.to(engine.device))]
            near = torch.cat([x.values for x in here])
            row = torch.cat([x.indices for x in here]) + first
            closer = near < found[:, 0]
            found[closer] = torch.stack([near, row.double()], dim=1)[closer]
        return found

    found = engine.map_rows(len(queries), measure).cpu()
    return found[:, 0], found[:, 1].long()


def distances(a: Tensor, b: Tensor) -> Iterator[Tensor]:
    """Yield Euclidean distances of a [M, D] from b [N, D], a few rows at a time, in float64.

    Distances below about 1e-6 of the vectors' norms are set to 0: they are rounding error, and
    duplicates must be at distance 0.
    """
    # By products of matrices, in float64: in float32 near neighbours would drown in rounding.
    b = b.double()
    squares_b = b.square().sum(1)
    for part in a.split(max(1, _AT_ONCE // len(b))):
        part = part.double()
        found = torch.cdist(part, b, compute_mode="use_mm_for_euclid_dist")
        smallest = (part.square().sum(1)[:, None] + squares_b).mul_(_RESOLUTION).sqrt_()
        yield found.masked_fill_(found <= smallest, 0.0)
