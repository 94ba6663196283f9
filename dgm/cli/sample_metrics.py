"""The measures of `launch/evaluate.py`, by the names of --measure: each gives figures by name.

What is measured of generated images is the mean over seeds; `spread_over_seeds` holds the standard
deviations, `by_seed` what each gave.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dgm import images
from dgm.cli.eval_context import Figures, Made, Subject
from dgm.cli.test_metrics import bits, bits_by_ode, loss_by_timestep, reconstruction
from dgm.evaluation.classifier import classify
from dgm.evaluation.cost import sampling_cost
from dgm.evaluation.distances import SCORE_SPLITS, class_score, kernel_distance
from dgm.evaluation.diversity import diversity_by_class
from dgm.evaluation.frechet import Moments, frechet_distance
from dgm.evaluation.memorization import Near, memorisation, nearest_first
from dgm.evaluation.prdc import COVERAGE_NEIGHBOURS, overlap
from dgm.report.read_run import SPREAD
from dgm.rng import permutation

_YARDSTICK = 2000  # test images whose neighbours are looked for, at most
_SHOWN = 20  # images on a sheet
_TIMED = 20  # images of which the making is timed
_PUBLISHED = {"frechet": "fid", "kernel": "kid", "score": "inception_score"}
_OWN = {"frechet": "fd", "kernel": "kd"}


def class_consistency(subject: Subject) -> Figures:
    """Ask the classifier which classes it sees in generated images."""
    test = subject.test
    rows = np.arange(len(test))
    right = classify(subject.classifier, test.images(rows)) == test.labels(rows)

    def one(made: Made) -> Figures:
        hits = classify(subject.classifier, made.pixels) == made.labels
        return {
            "class_consistency": float(hits.mean()),
            "class_consistency_by_class": {
                subject.trained.classes[label]: float(hits[made.labels == label].mean())
                for label in np.flatnonzero(subject.counts)
            },
        }

    accuracy = {"classifier_accuracy_on_real_test_images": float(right.mean())}
    return {**_over_seeds(subject, one, each_class=True), **accuracy}


def distances(subject: Subject) -> Figures:
    """Measure Frechet and kernel distance from the real images, and the score by classes."""
    real = subject.against[1]
    size = real.features.shape[1]
    if min(subject.num_images, len(real.features)) <= size and subject.engine.is_main:
        warnings.warn(
            f"{subject.num_images:,} generated and {len(real.features):,} real images are few for "
            f"{size:,} features: the Frechet distance comes out too large", stacklevel=2,
        )  # fmt: skip

    def one(made: Made) -> Figures:
        return {
            "frechet": frechet_distance(Moments.of(made.features), real.moments),
            "kernel": kernel_distance(made.features, real.features, subject.options.seed),
            "score": class_score(made.logits),
        }

    return {**_compared(subject), **_over_seeds(subject, one, _named(subject))}


def precision_recall(subject: Subject) -> Figures:
    """Measure how generated images and as many real ones overlap."""
    seen = subject.against[1].features
    real = seen[permutation(0, 0, len(seen))[: subject.num_images]]

    def one(made: Made) -> Figures:
        return overlap(subject.engine, made.features, real)

    told = {**_compared(subject), "num_real": len(real)}
    return {**told, **_over_seeds(subject, one, _named(subject))}


def diversity(subject: Subject) -> Figures:
    """Measure how various the images of each class are."""
    data, real = subject.against
    by_class = subject.trained.objective.num_classes is not None
    classes = {int(k): data.classes[k] for k in np.flatnonzero(subject.counts)}
    real_labels = torch.from_numpy(data.labels(np.arange(len(data))))

    def one(made: Made) -> Figures:
        labels = made.labels if by_class else classify(subject.classifier, made.pixels)
        found = diversity_by_class(
            subject.engine, made.features, torch.from_numpy(labels), real.features, real_labels,
            classes,
        )  # fmt: skip
        if by_class:
            del found["share_by_class"]  # of what was asked for
        various, covered = found["diversity_by_class"], found["coverage_by_class"]
        return {
            "diversity": statistics.fmean(various.values()),
            "least_diversity_of_a_class": min(various.values()),
            "coverage_of_classes": statistics.fmean(covered.values()),
            "least_coverage_of_a_class": min(covered.values()),
            **found,
        }

    said = "asked for" if by_class else "seen by the classifier"
    found = _over_seeds(subject, one, each_class=True)
    return {**_compared(subject), "classes_are": said, **found}


def neighbours(subject: Subject) -> Figures:
    """Look for the training images nearest to generated ones, and leave a sheet of them."""
    engine, train, test = subject.engine, subject.real, subject.test
    rows = permutation(0, 0, len(test))[:_YARDSTICK].numpy()
    train_pixels = _flat(train.images(np.arange(len(train))))
    scale = train_pixels.shape[1] ** -0.5  # to the root of the mean square
    spaces = {"features": subject.described_train.features, "pixels": train_pixels}
    real = {
        "features": Near.of(
            engine, subject.described_test.features[torch.from_numpy(rows)], spaces["features"]
        ),
        "pixels": Near.of(engine, _flat(test.images(rows)), train_pixels).scaled(scale),
    }

    def one(made: Made) -> Figures:
        near = {
            "features": Near.of(engine, made.features, spaces["features"]),
            "pixels": Near.of(engine, _flat(made.pixels), train_pixels).scaled(scale),
        }
        if made is subject.made(subject.options.seed) and engine.is_main:
            _save_sheet(subject, made, near)
        return {
            f"{name}_in_{space}": value
            for space in spaces
            for name, value in memorisation(near[space], real[space]).items()
        }

    told = {**_compared(subject), "against": "train", "num_real": len(train), "num_test": len(rows)}
    return {**told, **_over_seeds(subject, one), "sheet": sheet_path(subject).name}


def sheet_path(subject: Subject) -> Path:
    """Say where the sheet of neighbours goes."""
    return subject.folder / f"neighbours-{subject.features.name}.png"


def _save_sheet(subject: Subject, made: Made, near: dict[str, Near]) -> None:
    """Draw the images nearest to a training image above their neighbours by features and pixels."""
    chosen = nearest_first(near["features"], _SHOWN)
    rows = [made.pixels[chosen.numpy()]]
    rows += [subject.real.images(near[space].row[chosen].numpy()) for space in near]
    images.save_png(sheet_path(subject), images.grid(np.concatenate(rows), len(chosen)))


def _flat(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).flatten(1)


def cost(subject: Subject) -> Figures:
    """Count parameters and time the making of images."""
    trained = subject.trained
    count = min(_TIMED, subject.num_images)
    found = sampling_cost(
        subject.engine, trained.objective, subject.nets, count, len(trained.classes),
        subject.options.seed,
    )  # fmt: skip
    return {"num_timed": count, **found}


@dataclass(frozen=True)
class Measure:
    """A measure: how it is done, and the least number of generated images it takes."""

    measure: Callable[[Subject], Figures]
    least: int = 0
    by_features: bool = False
    of_family: str | None = None  # that alone has what is measured
    on_test: bool = False  # measured on test images, or beside them


MEASURES = {
    "class_consistency": Measure(class_consistency, 1, on_test=True),
    "distances": Measure(distances, SCORE_SPLITS, by_features=True),
    "precision_recall": Measure(precision_recall, COVERAGE_NEIGHBOURS + 1, by_features=True),
    "diversity": Measure(diversity, 2, by_features=True),
    "neighbours": Measure(neighbours, 1, by_features=True, on_test=True),
    "bits_per_dim": Measure(bits, on_test=True),
    "bits_per_dim_ode": Measure(bits_by_ode, of_family="diffusion", on_test=True),
    "loss_by_timestep": Measure(loss_by_timestep, of_family="diffusion", on_test=True),
    "reconstruction": Measure(reconstruction, of_family="vae", on_test=True),
    "cost": Measure(cost, 1),
}


def _compared(subject: Subject) -> Figures:
    """Say in what, and with what, generated images are compared."""
    features, data = subject.features, subject.against[0]
    return {
        "features": features.name,
        "weights": features.version,
        "resizer": features.resizer,
        "against": subject.options.against,
        "num_real": len(data),
    }


def _named(subject: Subject) -> Callable[[str], str]:
    """Name figures after the net in whose features they are: only Inception's are FID and KID."""
    name = subject.features.name
    if name == "inception":
        return lambda figure: _PUBLISHED.get(figure, f"{figure}_inception")
    return lambda figure: f"{_OWN.get(figure, figure)}_{name}"


def _over_seeds(
    subject: Subject,
    one: Callable[[Made], Figures],
    named: Callable[[str], str] = str,
    each_class: bool = False,
) -> Figures:
    """Measure images of each seed: means, spread, and each seed's own.

    each_class: of all classes equally many, whatever the frequencies of the data.
    """
    found = []
    for seed in subject.seeds:
        figures = one(subject.made(seed, each_class))
        found.append({named(name): value for name, value in figures.items()})
    told: Figures = {
        "num_generated": subject.num_images,
        "num_seeds": len(found),
        "first_seed": subject.options.seed,
    }
    if subject.trained.objective.num_classes is not None:
        told["labels"] = subject.labels_are(each_class)
    if len(found) == 1:
        return {**told, **found[0]}
    plain = [name for name, value in found[0].items() if not isinstance(value, dict)]
    return {
        **told,
        **_mean(found),
        SPREAD: {name: statistics.stdev(f[name] for f in found) for name in plain},
        "by_seed": [{name: f[name] for name in plain} for f in found],
    }


def _mean(found: list[Figures]) -> Figures:
    return {
        name: _mean([f[name] for f in found])
        if isinstance(value, dict)
        else statistics.fmean(f[name] for f in found)
        for name, value in found[0].items()
    }
