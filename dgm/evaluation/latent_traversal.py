"""Walks through a family's latents: from image to image, and along single directions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dgm.evaluation.classifier import Classifier
from dgm.evaluation.image_similarity import feature_distance
from dgm.latent_space import principal_directions, pull_back
from dgm.objective import Batch, Encoder, Latent, Nets
from dgm.rng import Draws
from dgm.training.device_loader import Images
from dgm.training.engine import Engine


def load(data: Images, index: Tensor, device: torch.device) -> Batch:
    """Load stored images by number."""
    return Batch(
        torch.from_numpy(data.images(index.numpy())).to(device),
        torch.from_numpy(data.labels(index.numpy())).to(device),
    )


@torch.no_grad()
def encode_on_all(
    engine: Engine, objective: Encoder, nets: Nets, data: Images, index: Tensor, seed: int
) -> Tensor:
    """Find the latents of stored images [N], each process a part: [N, D] on all."""

    def encode(mine: Tensor) -> Tensor:
        rows = index[mine]
        draws = Draws.of(seed, rows.to(engine.device))
        return objective.encode(nets, load(data, rows, engine.device), draws)

    return engine.map_rows(len(index), encode)


@torch.no_grad()
def decode_on_all(
    engine: Engine, objective: Latent, nets: Nets, z: Tensor, labels: Tensor, batch: int
) -> Tensor:
    """Make images of latents [R, K, D], each process a part: [R, K, C, H, W] on all.

    `labels` [R] are those of rows; `batch` images are made at a time.
    """
    flat, told = z.flatten(0, 1), labels.to(z.device).repeat_interleave(z.shape[1])

    def decode(mine: Tensor) -> Tensor:
        parts = (rows.to(z.device) for rows in mine.split(batch))
        return torch.cat([objective.decode(nets, flat[rows], told[rows]) for rows in parts])

    return engine.map_rows(len(flat), decode).float().unflatten(0, tuple(z.shape[:2]))


def smoothness(net: Classifier, rows: Tensor) -> list[dict[str, float]]:
    """Measure how evenly each row of images [R, K, C, H, W] changes, by the classifier's features.

    `mean_step` is the distance of neighbours on average; `largest_over_mean` is 1 for a row that
    changes evenly, and K - 1 for one that changes in a single leap.
    """
    before, after = rows[:, :-1].flatten(0, 1), rows[:, 1:].flatten(0, 1)
    steps = feature_distance(net, before, after).unflatten(0, (len(rows), -1)).double()
    means = steps.mean(1)
    uneven = torch.where(means > 0, steps.amax(1) / means, 1.0)
    return [
        {"mean_step": float(mean), "largest_over_mean": float(most)}
        for mean, most in zip(means, uneven, strict=True)
    ]


def distance_of_ends(net: Classifier, rows: Tensor) -> list[float]:
    """Measure how far the ends of each row of images [R, K, C, H, W] lie apart in features."""
    return feature_distance(net, rows[:, 0], rows[:, -1]).tolist()


def most_changing(
    engine: Engine, objective: Latent, nets: Nets, z: Tensor, labels: Tensor, count: int, seed: int
) -> tuple[Tensor, Sequence[float]]:
    """Find the directions in which images of latents about z [N, D] change most, [count, D].

    With each, the change of a pixel (root mean square, of the 2 from black to white) for a unit.
    """
    told = labels.to(z.device)

    def pulled(directions: Tensor) -> Tensor:
        def at(row: int) -> Tensor:
            own = told[row].expand(len(directions))
            return pull_back(lambda x: objective.decode(nets, x, own), z[row], directions.to(z))

        return engine.map_rows(len(z), lambda mine: torch.stack([at(int(k)) for k in mine])).mean(0)

    with torch.no_grad():
        pixels = objective.decode(nets, z[:1], told[:1]).numel()
    directions, values = principal_directions(pulled, z.shape[1], count, seed)
    return directions.to(z), (values.clamp(min=0) / pixels).sqrt().tolist()
