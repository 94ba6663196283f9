"""What is measured: a trained run, images made with it, and the real images beside them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jsonargparse import Namespace
from torch import Tensor

from dgm.cli.assemble import DataConfig, ensure_split, identify
from dgm.cli.load_run import Trained, open_trained
from dgm.common.atomic_dirs import cache_root
from dgm.common.errors import UserError
from dgm.common.progress import progress
from dgm.evaluation.class_labels import (
    BY_FREQUENCY,
    UNIFORM,
    count_classes,
    is_balanced,
    labels_by_frequency,
    uniform_labels,
)
from dgm.evaluation.classifier import Classifier, cached_classifier
from dgm.evaluation.feature_cache import Described, describe_real
from dgm.evaluation.features import Features, of_classifier
from dgm.evaluation.inception import FILE, inception_features
from dgm.evaluation.online_eval import enough_epochs
from dgm.images import to_uint8
from dgm.training.engine import Engine
from dgm.training.sampling import sample_distributed
from shards.class_folders import NoImages, NoTestImages
from shards.format import INDEX, Index, load_index
from shards.reader import Shards, open_shards

Figures = dict[str, Any]
"""What a measure gives, by name."""

_AT_ONCE = 5000  # images that are held as floats


@dataclass(frozen=True)
class Made:
    """Images made with a run from one seed, and what the net of features sees in them."""

    pixels: np.ndarray  # uint8 [N, H, W, C]
    labels: np.ndarray  # int64 [N]: the classes asked for
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
    _made: dict[tuple[int, str], Made] = field(default_factory=dict)

    @cached_property
    def nets(self) -> dict[str, torch.nn.Module]:
        """Give the nets on the device."""
        return {name: net.to(self.engine.device) for name, net in self.trained.nets.items()}

    @cached_property
    def test(self) -> Shards:
        """Open the test images, built where missing. Raises UserError where there are none."""
        where, why = self._find_test
        if where is None:
            raise UserError(f"there are no test images: {why}")
        test = open_shards(where, self.settings["resize"], self.trained.classes)
        if test.image_shape != self.real.image_shape:
            raise UserError(
                f"the test images of {where} are of shape {test.image_shape}, those of training of "
                f"{self.real.image_shape}: give --test_shards"
            )
        return test

    @property
    def lacks_test(self) -> str | None:
        """Return why there are no test images; None where there are. Collective: call on all."""
        return self._find_test[1]

    @cached_property
    def _find_test(self) -> tuple[str | None, str | None]:
        """Return the folder of the test images, or why there is none."""
        data = DataConfig(**self.settings)
        origin, given = self._origin, self.options.test_shards or data.test_shards
        if given is None and origin.source.startswith("tar:"):
            why = f"it was trained on {origin.source}, of which only train images are known"
            return None, f"{why}; give --test_shards DIR"
        if given is None:
            data = _as_built(data, origin)

        def find() -> tuple[str | None, str | None]:
            try:
                chosen = replace(data, test_shards=given)
                return str(ensure_split(chosen, "test", self.trained.classes)), None
            except (NoTestImages, NoImages) as error:
                return None, f"{error}, or give --test_shards DIR"

        return self.engine.on_main(find)

    @property
    def _origin(self) -> Index:
        """Return the index that the train shards were built with, if they need decoding too."""
        path = Path(self.settings.get("shards") or "") / INDEX
        return load_index(path) if path.is_file() else self.real.index

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

    @cached_property
    def counts(self) -> np.ndarray:
        """Count the train images of each class: int64 [classes]."""
        return count_classes(self.real, self.real.num_classes)

    @property
    def classes(self) -> list[str]:
        """Name the classes that have train images."""
        names = self.trained.classes
        return [name for name, count in zip(names, self.counts, strict=True) if count]

    @property
    def num_images(self) -> int:
        """Say how many images are made from each seed."""
        per_class = self.options.per_class
        return per_class * len(self.classes) if per_class else self.options.num_images

    def labels_are(self, each_class: bool = False) -> str:
        """Return how the labels of generated images are chosen: `BY_FREQUENCY` or `UNIFORM`.

        each_class: for a measure that looks at each class, which needs images of all.
        """
        if getattr(self.options, "per_class", None) or is_balanced(self.counts):
            return UNIFORM
        by_class = self.trained.objective.num_classes is not None
        return UNIFORM if each_class and by_class else BY_FREQUENCY

    @property
    def seeds(self) -> range:
        """Give the seeds that images are made from."""
        return range(self.options.seed, self.options.seed + self.options.seeds)

    def made(self, seed: int, each_class: bool = False) -> Made:
        """Make images from a seed, once, of classes as `labels_are`."""
        key = (seed, self.labels_are(each_class))
        if key not in self._made:
            index, objective = torch.arange(self.num_images), self.trained.objective
            choose_labels = uniform_labels if key[1] == UNIFORM else labels_by_frequency
            labels = choose_labels(len(index), self.counts)
            with progress(f"making images from seed {seed}", self.num_images):
                parts = [
                    to_uint8(
                        sample_distributed(
                            self.engine, objective, self.nets, rows, labels[rows], seed
                        ),
                        objective.pixels,
                    )
                    for rows in index.split(_AT_ONCE)
                ]
            pixels = np.concatenate(parts)
            seen = self.features.describe(self.engine, len(pixels), pixels.__getitem__)
            self._made[key] = Made(pixels, labels.numpy(), *seen)
        return self._made[key]

    def forget(self) -> None:
        """Let go of what was made."""
        self._made.clear()


def _as_built(data: DataConfig, index: Index) -> DataConfig:
    """Return the settings by which train shards were built, for the test images beside them."""
    settings = index.settings
    resize = settings.get("resize")
    return replace(
        data,
        source=index.source,
        resize=None if resize is None else int(resize),
        background=str(settings.get("background", "white")),
        holdout=float(settings.get("holdout", 0.0)),
        skip_bad=bool(settings.get("skip_bad", 0)),
    )


def open_on_all(engine: Engine, folder: Path, wanted: int | Literal["best"] | None) -> Trained:
    """Open a checkpoint of a run, the same on every process, though the run may go on."""
    opened: list[Trained] = []

    def first() -> int:
        opened.append(open_trained(folder, wanted))
        return opened[0].images_seen

    seen = engine.on_main(first)
    return opened[0] if opened else open_trained(folder, seen)
