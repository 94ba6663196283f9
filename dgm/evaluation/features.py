"""Nets in whose features images are compared: one interface for all measures."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from dgm.common.progress import advance, progress
from dgm.evaluation.classifier import Classifier, to_input
from dgm.training.device_loader import Images
from dgm.training.engine import Engine

See = Callable[[np.ndarray], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Features:
    """A net that describes images."""

    name: str
    """`cifar`, the project's own small net for images of such size; `inception`; or the latter with
    weights of other people."""
    version: str
    """Which weights these are."""
    resizer: str
    """How images come to the size that the net takes."""
    see: See
    """Give features [B, D] and logits [B, classes] of uint8 [B, H, W, C]."""
    batch: int

    @torch.no_grad()
    def describe(
        self, engine: Engine, count: int, images: Callable[[np.ndarray], np.ndarray]
    ) -> tuple[Tensor, Tensor]:
        """Describe the images of the rows 0 to count - 1, each process a part.

        Gives features [count, D] and logits [count, classes], float32 on the CPU, on all processes.
        """
        width = 0

        def work(rows: Tensor) -> Tensor:
            nonlocal width
            parts = []
            for own in rows.split(self.batch):
                features, logits = self.see(images(own.numpy()))
                width = features.shape[1]
                parts.append(torch.cat([features, logits], dim=1))
                advance(len(own))
            return torch.cat(parts)

        with progress(f"features of images by {self.name}", count):
            both = engine.map_rows(count, work).cpu()
        return both[:, :width].clone(), both[:, width:].clone()

    def describe_all(self, engine: Engine, data: Images) -> Tensor:
        """Describe every image of a data set, in its order."""
        return self.describe(engine, len(data), data.images)[0]


def of_classifier(net: Classifier) -> Features:
    """Compare images by what the project's own classifier of the real images sees."""
    device = next(net.parameters()).device

    def see(images: np.ndarray) -> tuple[Tensor, Tensor]:
        features = net.features(to_input(images, device))
        return features, net.out(features)

    return Features("cifar", fingerprint(net), "none: images as they are", see, 500)


def fingerprint(net: nn.Module) -> str:
    """Give a short name of a net's weights."""
    digest = hashlib.sha256()
    for value in net.state_dict().values():
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]
