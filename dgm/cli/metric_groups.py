"""The metrics of `launch/evaluate.py`, in groups by the names of --metrics.

Metrics of generated images are means over seeds; `spread_over_seeds` holds the standard deviations,
`by_seed` the values of each seed.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from dgm import images
from dgm.cli.eval_context import EvalContext, GeneratedImages
from dgm.diffusion.objective import DiffusionObjective
from dgm.evaluation import timesteps
from dgm.evaluation.classifier import classify
from dgm.evaluation.cost import sampling_cost
from dgm.evaluation.distances import (
    SCORE_SPLITS,
    FeatureStatistics,
    class_score,
    frechet_distance,
    kernel_distance,
)
from dgm.evaluation.diversity import diversity_by_class
from dgm.evaluation.likelihood import ImageSubset, bits_per_dim
from dgm.evaluation.memorization import memorization
from dgm.evaluation.online_eval import require_likelihood
from dgm.evaluation.prdc import COVERAGE_NEIGHBORS, nearest_neighbors, prdc
from dgm.evaluation.reconstruction import active_latents, reconstruction_error
from dgm.report.read_run import SPREAD
from dgm.rng import permutation
from dgm.vae.objective import VAEObjective

_MAX_TEST_IMAGES = 2000  # test images whose nearest training images are searched
_NUM_SHOWN = 20  # images on a sheet
_NUM_TIMED = 20  # images whose sampling is timed
_PUBLISHED = {"frechet": "fid", "kernel": "kid", "score": "inception_score"}
_OWN = {"frechet": "fd", "kernel": "kd"}

Metrics = dict[str, Any]
"""Values by metric name, and how they were computed."""


def _class_consistency(context: EvalContext) -> Metrics:
    test = context.test
    rows = np.arange(len(test))
    correct = classify(context.classifier, test.images(rows)) == test.labels(rows)

    def of_seed(generated: GeneratedImages) -> Metrics:
        hits = classify(context.classifier, generated.pixels) == generated.labels
        return {
            "class_consistency": float(hits.mean()),
            "class_consistency_by_class": {
                context.trained.classes[label]: float(hits[generated.labels == label].mean())
                for label in np.flatnonzero(context.counts)
            },
        }

    accuracy = {"classifier_accuracy_on_real_test_images": float(correct.mean())}
    return {**_over_seeds(context, of_seed, each_class=True), **accuracy}


def _distances(context: EvalContext) -> Metrics:
    real = context.features_of(context.reference)
    size = real.features.shape[1]
    if min(context.num_images, len(real.features)) <= size and context.engine.is_main:
        warnings.warn(
            f"{context.num_images:,} generated and {len(real.features):,} real images are few for "
            f"{size:,} features: the Frechet distance comes out too large", stacklevel=2,
        )  # fmt: skip

    def of_seed(generated: GeneratedImages) -> Metrics:
        statistics = FeatureStatistics.from_features(generated.features)
        return {
            "frechet": frechet_distance(statistics, real.statistics),
            "kernel": kernel_distance(generated.features, real.features, context.options.seed),
            "score": class_score(generated.logits),
        }

    return {**_protocol(context), **_over_seeds(context, of_seed, _key_of(context))}


def _precision_recall(context: EvalContext) -> Metrics:
    features, engine = context.features_of(context.reference).features, context.engine
    real = features[permutation(0, 0, len(features))[: context.num_images]].to(engine.device)

    def of_seed(generated: GeneratedImages) -> Metrics:
        return prdc(generated.features.to(engine.device), real, engine.map_rows)

    protocol = {**_protocol(context), "num_real": len(real)}
    return {**protocol, **_over_seeds(context, of_seed, _key_of(context))}


def _diversity(context: EvalContext) -> Metrics:
    data, real = context.reference, context.features_of(context.reference)
    by_class = context.class_conditional
    classes = {int(k): data.classes[k] for k in np.flatnonzero(context.counts)}
    real_labels = torch.from_numpy(data.labels(np.arange(len(data))))

    def of_seed(generated: GeneratedImages) -> Metrics:
        labels = generated.labels if by_class else classify(context.classifier, generated.pixels)
        metrics = diversity_by_class(
            generated.features, torch.from_numpy(labels), real.features, real_labels, classes
        )
        if by_class:
            del metrics["fraction_by_class"]  # they are as requested
        diversity, coverage = metrics["diversity_by_class"], metrics["coverage_by_class"]
        return {
            "diversity": statistics.fmean(diversity.values()),
            "min_diversity_of_a_class": min(diversity.values()),
            "coverage_of_classes": statistics.fmean(coverage.values()),
            "min_coverage_of_a_class": min(coverage.values()),
            **metrics,
        }

    classes_are = "requested" if by_class else "seen by the classifier"
    found = _over_seeds(context, of_seed, each_class=True)
    return {**_protocol(context), "classes_are": classes_are, **found}


def _memorization(context: EvalContext) -> Metrics:
    """Compare distances to the nearest training images, and write a sheet of the nearest."""
    engine, train, test = context.engine, context.train, context.test
    rows = permutation(0, 0, len(test))[:_MAX_TEST_IMAGES]
    train_pixels = torch.from_numpy(train.images(np.arange(len(train)))).flatten(1)
    scale = train_pixels.shape[1] ** -0.5  # from Euclidean distance to RMS

    def search(features: Tensor, pixels: np.ndarray) -> dict[str, tuple[Tensor, Tensor]]:
        """Return distance and row of the nearest training images, by features and by pixels."""
        base = context.features_of(train).features
        by_features = nearest_neighbors(features.to(engine.device), base, engine.map_rows)
        distance, row = nearest_neighbors(
            torch.from_numpy(pixels).flatten(1).to(engine.device), train_pixels, engine.map_rows
        )
        return {"features": by_features, "pixels": (distance * scale, row)}

    of_test = search(context.features_of(test).features[rows], test.images(rows.numpy()))
    sheet = context.folder / f"neighbours-{context.extractor.name}.png"

    def of_seed(generated: GeneratedImages) -> Metrics:
        nearest = search(generated.features, generated.pixels)
        if generated is context.generated(context.options.seed) and engine.is_main:
            chosen = nearest["features"][0].argsort(stable=True)[:_NUM_SHOWN]
            shown = [generated.pixels[chosen.numpy()]]
            shown += [train.images(row[chosen].numpy()) for _, row in nearest.values()]
            images.save_png(sheet, images.grid(np.concatenate(shown), len(chosen)))
        return {
            f"{name}_in_{space}": value
            for space, (distance, _) in nearest.items()
            for name, value in memorization(distance, of_test[space][0]).items()
        }

    protocol = {"against": "train", "num_real": len(train), "num_test": len(rows)}
    found = _over_seeds(context, of_seed)
    return {**_protocol(context), **protocol, **found, "sheet": sheet.name}


def _cost(context: EvalContext) -> Metrics:
    trained = context.trained
    count = min(_NUM_TIMED, context.num_images)
    cost = sampling_cost(
        context.engine, trained.objective, context.nets, count, len(trained.classes),
        context.options.seed,
    )  # fmt: skip
    return {"num_timed": count, **cost}


def _bits_per_dim(context: EvalContext) -> Metrics:
    images, samples = _test_images(context), context.options.importance_samples
    objective = require_likelihood(context.trained.objective, "--metrics", "distances")
    count = {"num_test_images": len(images.index)}
    if isinstance(objective, DiffusionObjective):
        return {**count, **timesteps.bound_by_timestep(objective, context.nets, images)}
    bits = bits_per_dim(objective, context.nets, images, samples)
    return {**count, "importance_samples": samples, **bits}


def _bits_per_dim_ode(context: EvalContext) -> Metrics:
    images, options = _test_images(context, batch=50), context.options
    objective = cast(DiffusionObjective, context.trained.objective)
    bits = timesteps.bits_by_ode(
        objective, context.nets, images, options.ode_steps, options.ode_tolerance
    )
    how = "uniform dequantization, Heun with Richardson extrapolation, one Rademacher probe"
    return {"num_test_images": len(images.index), "how": how, **bits}


def _loss_by_timestep(context: EvalContext) -> Metrics:
    images = _test_images(context)
    objective = cast(DiffusionObjective, context.trained.objective)
    losses = timesteps.loss_by_timestep(objective, context.nets, images)
    return {"num_test_images": len(images.index), **losses}


def _reconstruction(context: EvalContext) -> Metrics:
    images = _test_images(context)
    args = cast(VAEObjective, context.trained.objective), context.nets, images
    count = {"num_test_images": len(images.index)}
    return {**count, **reconstruction_error(*args), **active_latents(*args)}


def _test_images(context: EvalContext, batch: int = 100) -> ImageSubset:
    test, seed = context.test, context.options.seed
    index = permutation(seed, 0, len(test))[: context.options.num_test]
    return ImageSubset(context.engine, test, index, seed, batch)


@dataclass(frozen=True)
class MetricGroup:
    """Metrics that are computed together."""

    compute: Callable[[EvalContext], Metrics]
    min_images: int = 0  # generated images that it needs, for some metrics of each class
    by_features: bool = False
    family: str | None = None  # the only one that has them
    on_test: bool = False  # computed on test images, or in comparison with them


METRIC_GROUPS = {
    "class_consistency": MetricGroup(_class_consistency, 1, on_test=True),
    "distances": MetricGroup(_distances, SCORE_SPLITS, by_features=True),
    "precision_recall": MetricGroup(
        _precision_recall, COVERAGE_NEIGHBORS + 1, by_features=True,
    ),
    "diversity": MetricGroup(_diversity, 2, by_features=True),
    "memorization": MetricGroup(_memorization, 1, by_features=True, on_test=True),
    "bits_per_dim": MetricGroup(_bits_per_dim, on_test=True),
    "bits_per_dim_ode": MetricGroup(_bits_per_dim_ode, family="diffusion", on_test=True),
    "loss_by_timestep": MetricGroup(_loss_by_timestep, family="diffusion", on_test=True),
    "reconstruction": MetricGroup(_reconstruction, family="vae", on_test=True),
    "cost": MetricGroup(_cost, 1),
}  # fmt: skip


def compute_metrics(context: EvalContext, name: str) -> tuple[str, Metrics]:
    """Return the key in evaluation.json of a group, and its metrics."""
    group = METRIC_GROUPS[name]
    key = f"{name}_{context.extractor.name}" if group.by_features else name
    return key, group.compute(context)


def _protocol(context: EvalContext) -> Metrics:
    """Return in which features, and with which real images, generated ones are compared."""
    extractor = context.extractor
    return {
        "features": extractor.name,
        "weights": extractor.version,
        "resizer": extractor.resizer,
        "against": context.options.against,
        "num_real": len(context.reference),
    }


def _key_of(context: EvalContext) -> Callable[[str], str]:
    """Return the map from metric to key for these features: only Inception's give FID and KID."""
    features = context.extractor.name
    if features == "inception":
        return lambda metric: _PUBLISHED.get(metric, f"{metric}_inception")
    return lambda metric: f"{_OWN.get(metric, metric)}_{features}"


def _over_seeds(
    context: EvalContext,
    of_seed: Callable[[GeneratedImages], Metrics],
    key_of: Callable[[str], str] = str,
    each_class: bool = False,
) -> Metrics:
    """Return the mean over seeds, the standard deviation, and the values of each seed.

    each_class: with equally many images of all classes, whatever the frequencies of the data.
    """
    by_seed, first_seed = [], context.options.seed
    for seed in range(first_seed, first_seed + context.options.seeds):
        metrics = of_seed(context.generated(seed, each_class))
        by_seed.append({key_of(name): value for name, value in metrics.items()})
    settings: Metrics = {
        "num_generated": context.num_images,
        "num_seeds": len(by_seed),
        "first_seed": first_seed,
    }
    if context.class_conditional:
        settings["labels"] = context.label_policy(each_class)
    if len(by_seed) == 1:
        return {**settings, **by_seed[0]}
    scalars = [name for name, value in by_seed[0].items() if not isinstance(value, dict)]
    return {
        **settings,
        **_mean(by_seed),
        SPREAD: {name: statistics.stdev(m[name] for m in by_seed) for name in scalars},
        "by_seed": [{name: m[name] for name in scalars} for m in by_seed],
    }


def _mean(found: list[Metrics]) -> Metrics:
    return {
        name: _mean([metrics[name] for metrics in found])
        if isinstance(value, dict)
        else statistics.fmean(metrics[name] for metrics in found)
        for name, value in found[0].items()
    }
