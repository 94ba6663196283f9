"""What the settings of a sampler do to its images: quality, diversity, time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dgm.common.progress import progress
from dgm.evaluation.classifier import Classifier, describe
from dgm.evaluation.frechet import Moments, frechet_distance
from dgm.evaluation.image_similarity import feature_distance
from dgm.images import to_uint8
from dgm.objective import Nets, Objective
from dgm.preprocessing import STANDARD
from dgm.training.engine import Engine
from dgm.training.sampling import sample_distributed

_AT_A_TIME = 250  # pairs of images that are compared


@dataclass(frozen=True)
class Judge:
    """A classifier of the real images, and the moments of their features."""

    net: Classifier
    real: Moments
    by_class: bool  # whether images were asked for by class

    @torch.no_grad()
    def __call__(self, made: Tensor, labels: Tensor) -> dict[str, float]:
        """Measure images [N, C, H, W] (pixels.STANDARD) asked for by the classes `labels` [N].

        `fd_classifier`, and `diversity`, the distance between two images (of a class, where there
        are any) in features; `class_consistency`, or, without classes, `class_certainty`: the
        probability of the likeliest class, on average.
        """
        features = describe(self.net, to_uint8(made, STANDARD))
        seen = self.net.out(features.to(made.device)).cpu()
        found = {"fd_classifier": frechet_distance(Moments.of(features), self.real)}
        if self.by_class:
            found["class_consistency"] = float((seen.argmax(1) == labels).double().mean())
        else:
            found["class_certainty"] = float(seen.softmax(1).amax(1).double().mean())
        return {**found, "diversity": diversity(self.net, made, labels if self.by_class else None)}


def diversity(net: Classifier, made: Tensor, labels: Tensor | None) -> float:
    """Measure the mean distance of pairs of images [N, C, H, W] in a classifier's features.

    Each image is in one pair at most, with one of its own class where `labels` [N] are given.
    """
    order = torch.arange(len(made)) if labels is None else labels.argsort(stable=True)
    one, other = order[: len(order) // 2 * 2].unflatten(0, (-1, 2)).unbind(1)
    if labels is not None:
        alike = labels[one] == labels[other]
        one, other = one[alike], other[alike]
    parts = zip(one.split(_AT_A_TIME), other.split(_AT_A_TIME), strict=True)
    found = [feature_distance(net, made[a], made[b]) for a, b in parts if len(a)]
    return float(torch.cat(found).double().mean()) if found else 0.0


def _named(setting: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in setting.items())


def try_settings(
    engine: Engine,
    objective: Objective,
    nets: Nets,
    judge: Judge,
    settings: Sequence[dict[str, Any]],
    labels: Tensor,
    shown: int,
    seed: int,
    **fixed: Any,
) -> tuple[list[dict[str, Any]], Tensor]:
    """Make the same draws at each setting of the sampler; give figures and the first images.

    `seconds_per_image` is of all processes together. Images are [settings, shown, C, H, W], of
    pixels.STANDARD.
    """
    index = torch.arange(len(labels))
    rows, first = [], []
    sample_distributed(engine, objective, nets, index[:2], labels[:2], seed, **settings[0], **fixed)
    for setting in settings:
        began = time.perf_counter()
        with progress(f"making images at {_named(setting)}", len(labels)):
            made = sample_distributed(
                engine, objective, nets, index, labels, seed, **setting, **fixed
            )
        made[:, 0, 0, 0].tolist()  # wait for the device
        took = (time.perf_counter() - began) / len(labels)
        made = objective.pixels.convert(made.float(), STANDARD)
        rows.append({**setting, **judge(made, labels), "seconds_per_image": took})
        first.append(made[:shown].cpu())
    return rows, torch.stack(first)
