"""What is measured of the averaged weights while a run goes, and decides which are the best."""

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
from dgm.evaluation.classifier import Classifier, cached_classifier, describe
from dgm.evaluation.frechet import Moments, frechet_distance
from dgm.evaluation.likelihood import bits_per_dim
from dgm.images import to_uint8
from dgm.objective import Likelihood, Nets, Objective
from dgm.rng import permutation
from dgm.training.device_loader import Images
from dgm.training.engine import Engine
from dgm.training.sampling import sample_distributed

Metric = Literal["fd_classifier", "bits_per_dim"]
SEED = 1  # of classifier and test draws: the same for all runs, so that they can be compared

MOST_MADE = 1_000_000
"""Images that are made to be measured: so many are held in memory."""


@dataclass(frozen=True)
class EvalConfig:
    """What to measure as a run goes; the checkpoint with the best value so far is kept."""

    every_images: int = 0
    """Images between two measurements; 0 measures nothing."""
    metric: Metric = "fd_classifier"
    """fd_classifier: Frechet distance between real and generated images in the features of a
    classifier trained on the real ones, FD-cifar of launch/evaluate.py; bits_per_dim: of test
    images, for models that know it."""
    num_images: int = 2000
    """Images to generate, of classes as frequent as in the data, or test images to look at."""


@dataclass
class RealImages:
    """The images that a model is measured against."""

    train: Images
    num_classes: int
    data_id: str  # of the train images
    test: Callable[[], Images]  # opened only where they are needed


def make_evaluation(
    config: EvalConfig, objective: Objective, engine: Engine, real: RealImages, cache: Path
) -> Callable[[Nets], dict[str, float]] | None:
    """Make what measures the nets of a run; None where nothing is to be measured.

    Raises UserError where the family cannot be measured so.
    """
    check_range(config, "eval.", "every_images", least=0)
    check_range(config, "eval.", "num_images", least=2, most=MOST_MADE)
    if config.every_images == 0:
        return None
    if config.metric == "bits_per_dim":
        return _bits(config, has_likelihood(objective, "eval.metric"), engine, real)
    return _frechet(config, objective, engine, real, cache)


def has_likelihood(objective: Objective, key: str, other: str = "fd_classifier") -> Likelihood:
    """Give the objective as one with a likelihood; else UserError names `key` and `other`."""
    if not isinstance(objective, Likelihood):
        raise UserError(
            f"{key} is bits_per_dim, but this family gives images no likelihood: "
            f"choose {other}, or train a vae, a flow or a diffusion model"
        )
    return objective


def _bits(
    config: EvalConfig, objective: Likelihood, engine: Engine, real: RealImages
) -> Callable[[Nets], dict[str, float]]:
    test = real.test()
    index = permutation(SEED, 0, len(test))[: config.num_images]

    def measure(nets: Nets) -> dict[str, float]:
        found = bits_per_dim(engine, objective, nets, test, index, SEED)
        kind = "exact" if objective.exact else "bound"
        return {f"eval/bits_per_dim_{kind}": found[kind]}

    return measure


def _frechet(
    config: EvalConfig, objective: Objective, engine: Engine, real: RealImages, cache: Path
) -> Callable[[Nets], dict[str, float]]:
    @functools.cache
    def prepared() -> tuple[Classifier, Moments, torch.Tensor]:
        # Late, so that a mistake elsewhere is told before a minute is spent on this.
        net = judge(engine, cache, real)
        labels = labels_by_frequency(config.num_images, count_classes(real.train, real.num_classes))
        return net, moments_of_all(net, real.train), labels

    def measure(nets: Nets) -> dict[str, float]:
        distance = fd_classifier(engine, objective, nets, *prepared())
        return {"eval/fd_classifier": distance}

    return measure


def moments_of_all(net: Classifier, data: Images) -> Moments:
    """Measure the features of every image of a data set."""
    return Moments.of(describe(net, data.images(np.arange(len(data)))))


def judge(engine: Engine, cache: Path, real: RealImages) -> Classifier:
    """Give the classifier in whose features images are compared."""
    return cached_classifier(
        engine, cache, real.train, real.data_id, real.num_classes, enough_epochs(real.train), SEED
    )


def enough_epochs(data: Images) -> int:
    """Say how often a classifier has to see a data set: 20,000 images in all, or once."""
    return -(-20_000 // len(data))


def fd_classifier(
    engine: Engine,
    objective: Objective,
    nets: Nets,
    net: Classifier,
    wanted: Moments,
    labels: torch.Tensor,
) -> float:
    """Measure how far generated images of classes `labels` [N] are from the real ones."""
    index = torch.arange(len(labels))
    made = sample_distributed(engine, objective, nets, index, labels, SEED)
    return frechet_distance(Moments.of(describe(net, to_uint8(made, objective.pixels))), wanted)
