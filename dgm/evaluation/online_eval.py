"""Metrics of the averaged weights during training, by which the best checkpoint is chosen."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from dgm.common.errors import UserError
from dgm.common.validation import check_range
from dgm.evaluation.class_labels import count_classes, labels_by_frequency
from dgm.evaluation.classifier import Classifier, cached_classifier, extract_features
from dgm.evaluation.distances import FeatureStatistics, frechet_distance
from dgm.evaluation.likelihood import ImageSubset, bits_per_dim
from dgm.images import to_uint8
from dgm.objective import Likelihood, Nets, Objective
from dgm.rng import permutation
from dgm.training.device_loader import Images
from dgm.training.engine import Engine
from dgm.training.sampling import sample_distributed

SEED = 1  # of classifier and test draws: the same for all runs, so that they can be compared
MAX_SAMPLES = 1_000_000
"""Generated images to evaluate: all are held in memory."""


@dataclass(frozen=True)
class EvalConfig:
    """Metrics during training; the checkpoint with the best value so far is kept."""

    every_images: int = 0
    """Images between two evaluations; 0 evaluates nothing."""
    metric: Literal["fd_classifier", "bits_per_dim"] = "fd_classifier"
    """fd_classifier: Frechet distance between real and generated images in the features of a
    classifier trained on the real ones, as launch/evaluate.py --metrics distances writes it;
    bits_per_dim: of test images, for families with a likelihood."""
    num_images: int = 2000
    """Images to generate, of classes as frequent as in the data, or test images to evaluate."""


@dataclass
class RealImages:
    """The real images that a model is compared with."""

    train: Images
    num_classes: int
    data_id: str  # identifies the train images
    test: Callable[[], Images]  # opened only if needed


def make_evaluation(
    config: EvalConfig, objective: Objective, engine: Engine, real: RealImages, cache: Path
) -> Callable[[Nets], dict[str, float]] | None:
    """Return a function that computes the metric of nets; None if `every_images` is 0.

    Raise UserError if the family does not have the metric.
    """
    check_range(config, "eval.", "every_images", min=0)
    check_range(config, "eval.", "num_images", min=2, max=MAX_SAMPLES)
    if config.every_images == 0:
        return None
    if config.metric == "bits_per_dim":
        return _bits_evaluation(config, require_likelihood(objective, "eval.metric"), engine, real)
    return _fd_evaluation(config, objective, engine, real, cache)


def require_likelihood(objective: Objective, key: str, other: str = "fd_classifier") -> Likelihood:
    """Return the objective if it has a likelihood; else raise UserError, suggesting `other`."""
    if not isinstance(objective, Likelihood):
        raise UserError(
            f"{key} is bits_per_dim, but this family gives images no likelihood: "
            f"choose {other}, or train a vae, a flow or a diffusion model"
        )
    return objective


def _bits_evaluation(
    config: EvalConfig, objective: Likelihood, engine: Engine, real: RealImages
) -> Callable[[Nets], dict[str, float]]:
    test = real.test()
    index = permutation(SEED, 0, len(test))[: config.num_images]
    images = ImageSubset(engine, test, index, SEED)

    def evaluate(nets: Nets) -> dict[str, float]:
        kind = "exact" if objective.exact else "bound"
        return {f"eval/bits_per_dim_{kind}": bits_per_dim(objective, nets, images)[kind]}

    return evaluate


def _fd_evaluation(
    config: EvalConfig, objective: Objective, engine: Engine, real: RealImages, cache: Path
) -> Callable[[Nets], dict[str, float]]:
    # Deferred to the first evaluation: it takes a minute, and other errors should show before.
    @functools.cache
    def prepare() -> tuple[Classifier, FeatureStatistics, torch.Tensor]:
        data = real.train
        net = cached_classifier(
            engine, cache, data, real.data_id, real.num_classes, default_epochs(data), SEED
        )
        features = extract_features(net, data.images(np.arange(len(data))))
        labels = labels_by_frequency(config.num_images, count_classes(data, real.num_classes))
        return net, FeatureStatistics.from_features(features), labels

    def evaluate(nets: Nets) -> dict[str, float]:
        return {"eval/fd_classifier": fd_classifier(engine, objective, nets, *prepare())}

    return evaluate


def default_epochs(data: Images) -> int:
    """Return the epochs to train a classifier: enough to see 20,000 images, at least one."""
    return -(-20_000 // len(data))


def fd_classifier(
    engine: Engine,
    objective: Objective,
    nets: Nets,
    net: Classifier,
    real: FeatureStatistics,
    labels: torch.Tensor,
) -> float:
    """Return the Frechet distance of samples of classes `labels` [N] from the real images."""
    index = torch.arange(len(labels))
    samples = to_uint8(
        sample_distributed(engine, objective, nets, index, labels, SEED), objective.pixels
    )
    statistics = FeatureStatistics.from_features(extract_features(net, samples))
    return frechet_distance(statistics, real)
