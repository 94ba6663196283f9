"""Precision, recall, density and coverage, by nearest neighbors in features of a net."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

PRECISION_NEIGHBORS = 3  # as in Kynkaanniemi et al. 2019
COVERAGE_NEIGHBORS = 5  # as in Naeem et al. 2020
_TIE = 1e-9  # relative difference up to which distances count as equal: they are rounded at 1e-12
_MAX_DISTANCES = 2**25  # that are held in memory at once
_RESOLUTION = 1e-12  # smallest squared distance, relative to the vectors' squared norms
_BLOCK = 10_000  # base vectors that are searched at once

Spread = Callable[[int, Callable[[Tensor], Tensor]], Tensor]
"""Apply a function to the rows 0 to count - 1: on this process, or `Engine.map_rows` on all."""


def on_this_process(count: int, work: Callable[[Tensor], Tensor]) -> Tensor:
    """Return `work` of all rows, computed on this process."""
    return work(torch.arange(count))


def prdc(generated: Tensor, real: Tensor, spread: Spread = on_this_process) -> dict[str, float]:
    """Compare generated features [M, D] with real ones [N, D], ideally M = N.

    precision: fraction of generated images in the closed ball around any real one whose radius is
    the distance to its third neighbor; recall: the same with the sets exchanged (Kynkaanniemi et
    al. 2019, equations 1 to 3). density: number of open balls around real images, out to their
    fifth neighbor, that contain a generated image, divided by five; coverage: fraction of these
    balls that contain any (Naeem et al. 2020, equations 2 and 3; open balls as in their package
    prdc).

    For two sets of one distribution density is 1 and coverage 1 - 2^-5 = 0.97 on average, whatever
    the distribution; precision and recall are below 1 by an amount that depends on it. For a set
    against itself all four are 1 (density: if its images differ).
    """
    near_real = knn_radii(real, PRECISION_NEIGHBORS, spread)
    near_generated = knn_radii(generated, PRECISION_NEIGHBORS, spread)
    coverage_radii = knn_radii(real, COVERAGE_NEIGHBORS, spread)

    def of_generated(rows: Tensor) -> Tensor:
        parts = [
            torch.stack(
                [in_closed_ball(d, near_real).any(1), in_open_ball(d, coverage_radii).sum(1)], dim=1
            )
            for d in pairwise_distances(generated[rows], real)
        ]
        return torch.cat(parts).double()

    def of_real(rows: Tensor) -> Tensor:
        radii, start, parts = coverage_radii[rows], 0, []
        for d in pairwise_distances(real[rows], generated):
            covered = in_open_ball(d.min(1).values, radii[start : start + len(d)])
            parts.append(torch.stack([in_closed_ball(d, near_generated).any(1), covered], dim=1))
            start += len(d)
        return torch.cat(parts).double()

    precision, num_balls = spread(len(generated), of_generated).mean(0).tolist()
    recall, coverage = spread(len(real), of_real).mean(0).tolist()
    density = num_balls / COVERAGE_NEIGHBORS
    return {"precision": precision, "recall": recall, "density": density, "coverage": coverage}


def in_closed_ball(distance: Tensor, radius: Tensor) -> Tensor:
    """Return where distance <= radius, counting those equal up to rounding as inside."""
    return distance <= radius * (1 + _TIE)


def in_open_ball(distance: Tensor, radius: Tensor) -> Tensor:
    """Return where distance < radius, counting those equal up to rounding as outside."""
    return distance < radius * (1 - _TIE)


def knn_radii(features: Tensor, k: int, spread: Spread = on_this_process) -> Tensor:
    """Return the distance of each vector [N, D] to its k-th neighbor in the set: [N]."""

    def radii(rows: Tensor) -> Tensor:
        # The nearest is the vector itself.
        parts = pairwise_distances(features[rows], features)
        return torch.cat([d.kthvalue(k + 1).values for d in parts])

    return spread(len(features), radii)


def nearest_neighbors(
    queries: Tensor, base: Tensor, spread: Spread = on_this_process
) -> tuple[Tensor, Tensor]:
    """Return distance and row of the nearest of base [N, D] to each query [M, D]: each [M].

    They are on the CPU. `base` is moved to the queries' device in blocks.
    """

    def search(rows: Tensor) -> Tensor:
        own = queries[rows]
        best = torch.full((len(rows), 2), torch.inf, dtype=torch.float64, device=own.device)
        for start, block in zip(range(0, len(base), _BLOCK), base.split(_BLOCK), strict=True):
            minima = [d.min(dim=1) for d in pairwise_distances(own, block.to(own.device))]
            distance = torch.cat([m.values for m in minima])
            row = torch.cat([m.indices for m in minima]) + start
            closer = distance < best[:, 0]
            best[closer] = torch.stack([distance, row.double()], dim=1)[closer]
        return best

    distance, row = spread(len(queries), search).cpu().unbind(1)
    return distance, row.long()


def pairwise_distances(a: Tensor, b: Tensor) -> Iterator[Tensor]:
    """Yield Euclidean distances of a [M, D] from b [N, D], some rows of a at a time, in float64.

    Distances below about 1e-6 of the vectors' norms are set to 0: they are rounding error, and
    duplicates must be at distance 0.
    """
    # By matrix products, in float64: in float32 near neighbors would be lost in rounding.
    b = b.double()
    squares_b = b.square().sum(1)
    for part in a.split(max(1, _MAX_DISTANCES // len(b))):
        part = part.double()
        distance = torch.cdist(part, b, compute_mode="use_mm_for_euclid_dist")
        smallest = (part.square().sum(1)[:, None] + squares_b).mul_(_RESOLUTION).sqrt_()
        yield distance.masked_fill_(distance <= smallest, 0.0)
