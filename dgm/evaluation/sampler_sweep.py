"""Quality, diversity and time of samples over settings of the sampler."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dgm.common.progress import progress
from dgm.evaluation.classifier import Classifier, extract_features
from dgm.evaluation.distances import FeatureStatistics, frechet_distance
from dgm.evaluation.image_similarity import feature_distance
from dgm.images import to_uint8
from dgm.objective import Nets, Objective
from dgm.preprocessing import STANDARD
from dgm.training.engine import Engine
from dgm.training.sampling import sample_distributed

_BATCH = 250  # pairs of images that are compared at once


@dataclass(frozen=True)
class SampleQuality:
    """Metrics of samples by a classifier of the real images."""

    net: Classifier
    real: FeatureStatistics
    class_conditional: bool

    @torch.no_grad()
    def __call__(self, samples: Tensor, labels: Tensor) -> dict[str, float]:
        """Return metrics of samples [N, C, H, W] of the classes `labels` [N].

        Samples are images of preprocessing.STANDARD. Metrics are `fd_classifier`, `diversity` (of
        pairs within a class if class-conditional) and `class_consistency` or, without classes,
        `class_certainty`: the mean probability of the likeliest class.
        """
        features = extract_features(self.net, to_uint8(samples, STANDARD))
        logits = self.net.out(features.to(samples.device)).cpu()
        statistics = FeatureStatistics.from_features(features)
        metrics = {"fd_classifier": frechet_distance(statistics, self.real)}
        if self.class_conditional:
            metrics["class_consistency"] = float((logits.argmax(1) == labels).double().mean())
        else:
            metrics["class_certainty"] = float(logits.softmax(1).amax(1).double().mean())
        pair_labels = labels if self.class_conditional else None
        return {**metrics, "diversity": paired_diversity(self.net, samples, pair_labels)}


def paired_diversity(net: Classifier, samples: Tensor, labels: Tensor | None) -> float:
    """Return the mean distance of pairs of images [N, C, H, W] in a classifier's features.

    Each image is in at most one pair, with one of its own class if `labels` [N] are given.
    """
    order = torch.arange(len(samples)) if labels is None else labels.argsort(stable=True)
    one, other = order[: len(order) // 2 * 2].unflatten(0, (-1, 2)).unbind(1)
    if labels is not None:
        same = labels[one] == labels[other]
        one, other = one[same], other[same]
    pairs = zip(one.split(_BATCH), other.split(_BATCH), strict=True)
    parts = [feature_distance(net, samples[a], samples[b]) for a, b in pairs if len(a)]
    return float(torch.cat(parts).double().mean()) if parts else 0.0


def sweep_sampler(
    engine: Engine,
    objective: Objective,
    nets: Nets,
    quality: SampleQuality,
    settings: Sequence[dict[str, Any]],
    labels: Tensor,
    num_shown: int,
    seed: int,
    **fixed: Any,
) -> tuple[list[dict[str, Any]], Tensor]:
    """Sample with the same draws at each setting; return the metrics and the first images of each.

    `seconds_per_image` is that of all processes together. Images are of
    preprocessing.STANDARD, [settings, num_shown, C, H, W]. Collective: call on all ranks.
    """
    index = torch.arange(len(labels))
    rows, shown = [], []
    # Warm up.
    sample_distributed(engine, objective, nets, index[:2], labels[:2], seed, **settings[0], **fixed)
    for setting in settings:
        name = ", ".join(f"{knob} {value:g}" for knob, value in setting.items())
        start = time.perf_counter()
        with progress(f"sampling at {name}", len(labels)):
            samples = sample_distributed(
                engine, objective, nets, index, labels, seed, **setting, **fixed
            )
        samples[:, 0, 0, 0].tolist()  # wait for the device
        seconds = (time.perf_counter() - start) / len(labels)
        samples = objective.pixels.convert(samples.float(), STANDARD)
        rows.append({**setting, **quality(samples, labels), "seconds_per_image": seconds})
        shown.append(samples[:num_shown].cpu())
    return rows, torch.stack(shown)
