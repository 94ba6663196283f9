"""Nets in whose features images are compared, behind one interface for all metrics."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from dgm.common.progress import advance, progress
from dgm.evaluation.classifier import BATCH, Classifier, to_input
from dgm.training.engine import Engine

Forward = Callable[[np.ndarray], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class FeatureExtractor:
    """A net that maps images to features and logits."""

    name: str
    """`classifier`, the project's own; `inception`; or `inception-SHA256`, the same net with
    other weights than the standard ones."""
    version: str
    """Hash of the weights."""
    resizer: str
    """How images are resized for the net."""
    forward: Forward
    """Returns features [B, D] and logits [B, classes] of uint8 [B, H, W, C]."""
    batch: int

    @torch.no_grad()
    def compute(
        self, engine: Engine, count: int, images: Callable[[np.ndarray], np.ndarray]
    ) -> tuple[Tensor, Tensor]:
        """Return features [count, D] and logits [count, classes] of the rows 0 to count - 1.

        float32 on the CPU of all processes, each of which computes a part. Collective: call on all
        ranks.
        """
        width = 0

        def work(rows: Tensor) -> Tensor:
            nonlocal width
            parts = []
            for own in rows.split(self.batch):
                features, logits = self.forward(images(own.numpy()))
                width = features.shape[1]
                parts.append(torch.cat([features, logits], dim=1))
                advance(len(own))
            return torch.cat(parts)

        with progress(f"features of images by {self.name}", count):
            both = engine.map_rows(count, work).cpu()
        return both[:, :width].clone(), both[:, width:].clone()


def classifier_features(net: Classifier) -> FeatureExtractor:
    """Return the extractor of a classifier's features."""
    device = next(net.parameters()).device

    def forward(images: np.ndarray) -> tuple[Tensor, Tensor]:
        features = net.features(to_input(images, device))
        return features, net.out(features)

    return FeatureExtractor(
        "classifier", fingerprint(net), "none: images as they are", forward, BATCH
    )


def fingerprint(net: nn.Module) -> str:
    """Return a short hash of a net's weights."""
    digest = hashlib.sha256()
    for value in net.state_dict().values():
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]
