"""Interpolation between latents, and traversal along single directions of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dgm.evaluation.classifier import Classifier
from dgm.evaluation.image_similarity import feature_distance
from dgm.evaluation.likelihood import load_batch
from dgm.latent_space import jtj_product, principal_directions
from dgm.objective import LatentDecoder, LatentEncoder, Nets
from dgm.rng import Draws
from dgm.training.device_loader import Images
from dgm.training.engine import Engine


@torch.no_grad()
def encode_on_all(
    engine: Engine, objective: LatentEncoder, nets: Nets, data: Images, index: Tensor, seed: int
) -> Tensor:
    """Return latents [N, D] of the images at `index` [N]. Collective: call on all ranks."""

    def encode(rows: Tensor) -> Tensor:
        own = index[rows]
        draws = Draws.of(seed, own.to(engine.device))
        return objective.encode(nets, load_batch(data, own, engine.device), draws)

    return engine.map_rows(len(index), encode)


@torch.no_grad()
def decode_on_all(
    engine: Engine, objective: LatentDecoder, nets: Nets, z: Tensor, labels: Tensor, batch: int
) -> Tensor:
    """Return images [R, K, C, H, W] of latents [R, K, D]. Collective: call on all ranks.

    `labels` [R] are those of rows; `batch` images are decoded at a time.
    """
    flat, flat_labels = z.flatten(0, 1), labels.to(z.device).repeat_interleave(z.shape[1])

    def decode(own: Tensor) -> Tensor:
        parts = (rows.to(z.device) for rows in own.split(batch))
        return torch.cat([objective.decode(nets, flat[rows], flat_labels[rows]) for rows in parts])

    return engine.map_rows(len(flat), decode).float().unflatten(0, tuple(z.shape[:2]))


def smoothness(net: Classifier, rows: Tensor) -> list[dict[str, float]]:
    """Return how evenly each row of images [R, K, C, H, W] changes in the classifier's features.

    `mean_step` is the mean distance of consecutive images; `largest_over_mean` is 1 for a row that
    changes evenly, and K - 1 for one that changes in a single step.
    """
    before, after = rows[:, :-1].flatten(0, 1), rows[:, 1:].flatten(0, 1)
    steps = feature_distance(net, before, after).unflatten(0, (len(rows), -1)).double()
    means = steps.mean(1)
    ratios = torch.where(means > 0, steps.amax(1) / means, 1.0)
    return [
        {"mean_step": float(mean), "largest_over_mean": float(ratio)}
        for mean, ratio in zip(means, ratios, strict=True)
    ]


def most_changing_directions(
    engine: Engine,
    objective: LatentDecoder,
    nets: Nets,
    z: Tensor,
    labels: Tensor,
    count: int,
    seed: int,
) -> tuple[Tensor, Sequence[float]]:
    """Return the directions [count, D] in which images of latents near z [N, D] change most.

    Also return, for each, the root mean square change of a pixel for a unit step (black to white
    is 2). Collective: call on all ranks.
    """
    labels = labels.to(z.device)

    def mean_product(directions: Tensor) -> Tensor:
        def product_at(row: int) -> Tensor:
            own = labels[row].expand(len(directions))
            return jtj_product(lambda x: objective.decode(nets, x, own), z[row], directions.to(z))

        return engine.map_rows(
            len(z), lambda rows: torch.stack([product_at(int(k)) for k in rows])
        ).mean(0)

    with torch.no_grad():
        num_pixels = objective.decode(nets, z[:1], labels[:1]).numel()
    directions, values = principal_directions(mean_product, z.shape[1], count, seed)
    return directions.to(z), (values.clamp(min=0) / num_pixels).sqrt().tolist()
