"""What is measured: a trained run, images made with it, and the real images beside them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jsonargparse import Namespace
from torch import Tensor

from dgm.errors import UserError
from dgm.eval.classifier import Classifier, cached_classifier
from dgm.eval.during import enough_epochs
from dgm.eval.features import Features, of_classifier
from dgm.eval.inception import FILE, inception_features
from dgm.eval.real import Described, describe_real
from dgm.images import to_uint8
from dgm.progress import progress
from dgm.train.engine import Engine
from dgm.train.sampling import sample_on_all
from launch.trained import Trained, open_trained
from launch.training import identify
from shards.build import ensure
from shards.folders import cache_root
from shards.read import Shards, open_shards

Figures = dict[str, Any]
"""What a measure gives, by name."""

_AT_ONCE = 5000  # images that are held as floats


@dataclass(frozen=True)
class Made:
    """Images made with a run from one seed, and what the net of features sees in them."""

    pixels: np.ndarray  # uint8 [N, H, W, C]
    labels: np.ndarray  # int64 [N]: the classes asked for, in turn
    features: Tensor  # [N, D]
    logits: Tensor  # [N, classes]


@dataclass
class Subject:
    """A trained run and the real images it is measured against."""

    options: Namespace
    engine: Engine
    trained: Trained
    real: Shards
    settings: dict[str, Any]  # the run's `data` section
    folder: Path = Path()
    _made: dict[int, Made] = field(default_factory=dict)

    @cached_property
    def nets(self) -> dict[str, torch.nn.Module]:
        """Give the nets on the device."""
        return {name: net.to(self.engine.device) for name, net in self.trained.nets.items()}

    @cached_property
    def test(self) -> Shards:
        """Open the test images, built where missing."""
        source, resize = self.settings["source"], self.settings["resize"]
        shards = self.options.test_shards or self.settings.get("test_shards")
        where = self.engine.on_main(
            lambda: str(ensure(source, shards, split="test", resize=resize))
        )
        test = open_shards(where)
        if test.image_shape != self.real.image_shape:
            raise UserError(
                f"the test images of {where} are of shape {test.image_shape}, those of training of "
                f"{self.real.image_shape}: give --test_shards"
            )
        return test

    @cached_property
    def classifier(self) -> Classifier:
        """Give the classifier of the real images, trained once for a data set."""
        return cached_classifier(
            self.engine, cache_root(), self.real, identify(self.real), self.real.num_classes,
            self.options.epochs or enough_epochs(self.real), self.options.seed,
        )  # fmt: skip

    @cached_property
    def features(self) -> Features:
        """Give the net in whose features images are compared."""
        if self.options.features == "cifar":
            return of_classifier(self.classifier)
        path = Path(self.options.weights or cache_root() / FILE)
        return inception_features(path, self.engine.device)

    @cached_property
    def described_train(self) -> Described:
        """Give what the net sees in the train images."""
        return describe_real(
            self.engine, cache_root(), self.features, self.real, identify(self.real)
        )

    @cached_property
    def described_test(self) -> Described:
        """Give what the net sees in the test images."""
        return describe_real(
            self.engine, cache_root(), self.features, self.test, identify(self.test)
        )

    @property
    def against(self) -> tuple[Shards, Described]:
        """Give the real images that generated ones are compared with, by --against."""
        if self.options.against == "test":
            return self.test, self.described_test
        return self.real, self.described_train

    @property
    def num_images(self) -> int:
        """Say how many images are made from each seed."""
        per_class = self.options.per_class
        return per_class * len(self.trained.classes) if per_class else self.options.num_images

    @property
    def seeds(self) -> range:
        """Give the seeds that images are made from."""
        return range(self.options.seed, self.options.seed + self.options.seeds)

    def made(self, seed: int) -> Made:
        """Make images from a seed, once, the classes in turn."""
        if seed not in self._made:
            index, objective = torch.arange(self.num_images), self.trained.objective
            labels = index % len(self.trained.classes)
            with progress(f"making images from seed {seed}", self.num_images):
                parts = [
                    to_uint8(
                        sample_on_all(self.engine, objective, self.nets, rows, labels[rows], seed),
                        objective.pixels,
                    )
                    for rows in index.split(_AT_ONCE)
                ]
            pixels = np.concatenate(parts)
            seen = self.features.describe(self.engine, len(pixels), pixels.__getitem__)
            self._made[seed] = Made(pixels, labels.numpy(), *seen)
        return self._made[seed]

    def forget(self) -> None:
        """Let go of what was made."""
        self._made.clear()


def open_on_all(engine: Engine, folder: Path, wanted: int | Literal["best"] | None) -> Trained:
    """Open a checkpoint of a run, the same on every process, though the run may go on."""
    opened: list[Trained] = []

    def first() -> int:
        opened.append(open_trained(folder, wanted))
        return opened[0].images_seen

    seen = engine.on_main(first)
    return opened[0] if opened else open_trained(folder, seen)
