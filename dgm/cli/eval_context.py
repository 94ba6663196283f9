"""What metrics are computed from: a trained run, images generated with it, and the real images."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import ArgumentParser, Namespace
from torch import Tensor

from dgm.cli.assemble import DataConfig, ensure_split, identify
from dgm.cli.load_run import TrainedRun
from dgm.cli.parser import path_word
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
from dgm.evaluation.feature_cache import DatasetFeatures, cached_features
from dgm.evaluation.features import FeatureExtractor, classifier_features
from dgm.evaluation.inception import FILE, inception_features
from dgm.evaluation.online_eval import default_epochs
from dgm.images import to_uint8
from dgm.training.engine import Engine
from dgm.training.sampling import sample_distributed
from shards.class_folders import NoImages, NoTestImages
from shards.format import INDEX, Index, load_index
from shards.reader import Shards, open_shards

_CHUNK = 5000  # images that are held as floats


@dataclass(frozen=True)
class GeneratedImages:
    """Images generated from one seed, and their features."""

    pixels: np.ndarray  # uint8 [N, H, W, C]
    labels: np.ndarray  # int64 [N]: the requested classes
    features: Tensor  # [N, D]
    logits: Tensor  # [N, classes]


@dataclass
class EvalContext:
    """A trained run and the real images it is compared with."""

    options: Namespace
    engine: Engine
    trained: TrainedRun
    train: Shards
    settings: dict[str, Any]  # the run's `data` section
    folder: Path = Path()
    _features: dict[str, DatasetFeatures] = field(default_factory=dict)  # by identity of the data
    _generated: dict[tuple[int, str], GeneratedImages] = field(default_factory=dict)

    @cached_property
    def nets(self) -> dict[str, torch.nn.Module]:
        """Return the nets on the device."""
        return {name: net.to(self.engine.device) for name, net in self.trained.nets.items()}

    @cached_property
    def test(self) -> Shards:
        """Return the test images, built if missing. Raise UserError if there are none."""
        folder, reason = self._find_test
        if folder is None:
            raise UserError(f"there are no test images: {reason}")
        test = open_shards(folder, self.settings["resize"], self.trained.classes)
        if test.image_shape != self.train.image_shape:
            raise UserError(
                f"the test images of {folder} are of shape {test.image_shape}, those of training "
                f"of {self.train.image_shape}: give --test_shards"
            )
        return test

    @property
    def why_no_test(self) -> str | None:
        """Return why there are no test images, or None. Collective: call on all ranks."""
        return self._find_test[1]

    @cached_property
    def _find_test(self) -> tuple[str | None, str | None]:
        """Return the folder of the test images, or why there is none."""
        data = DataConfig(**self.settings)
        # The train shards themselves may need decoding, and were built with the settings.
        index_path = Path(self.settings.get("shards") or "") / INDEX
        origin = load_index(index_path) if index_path.is_file() else self.train.index
        test_shards = self.options.test_shards or data.test_shards
        if test_shards is None and origin.source.startswith(("tar:", "array")):
            reason = f"it was trained on {origin.source}, of which only train images are known"
            return None, f"{reason}; give --test_shards DIR"
        if test_shards is None:
            data = _build_settings(data, origin)

        def find() -> tuple[str | None, str | None]:
            try:
                config = replace(data, test_shards=test_shards)
                return str(ensure_split(config, "test", self.trained.classes)), None
            except (NoTestImages, NoImages) as error:
                return None, f"{error}, or give --test_shards DIR"

        return self.engine.on_main(find)

    @cached_property
    def classifier(self) -> Classifier:
        """Return the classifier of the real images, trained once for a data set."""
        return cached_classifier(
            self.engine, cache_root(), self.train, identify(self.train), self.train.num_classes,
            self.options.epochs or default_epochs(self.train), self.options.seed,
        )  # fmt: skip

    @cached_property
    def extractor(self) -> FeatureExtractor:
        """Return the net in whose features images are compared, by --features."""
        if getattr(self.options, "features", "cifar") == "cifar":
            return classifier_features(self.classifier)
        path = Path(self.options.weights or cache_root() / FILE)
        return inception_features(path, self.engine.device)

    def features_of(self, data: Shards) -> DatasetFeatures:
        """Return the features of the train or test images, computed once."""
        key = identify(data)
        if key not in self._features:
            self._features[key] = cached_features(
                self.engine, cache_root(), self.extractor, data, key
            )
        return self._features[key]

    @property
    def reference(self) -> Shards:
        """Return the real images that generated ones are compared with, by --against."""
        return self.test if self.options.against == "test" else self.train

    @cached_property
    def counts(self) -> np.ndarray:
        """Return the number of train images of each class: int64 [classes]."""
        return count_classes(self.train, self.train.num_classes)

    @property
    def class_conditional(self) -> bool:
        """Return whether the nets are given labels."""
        return self.trained.objective.num_classes is not None

    @property
    def classes(self) -> list[str]:
        """Return the names of the classes that have train images."""
        names = self.trained.classes
        return [name for name, count in zip(names, self.counts, strict=True) if count]

    @property
    def num_images(self) -> int:
        """Return the number of images generated from each seed."""
        per_class = self.options.per_class
        return per_class * len(self.classes) if per_class else self.options.num_images

    def label_policy(self, each_class: bool = False) -> str:
        """Return how the labels of generated images are chosen: `BY_FREQUENCY` or `UNIFORM`.

        each_class: for a metric by class, which needs images of all.
        """
        if getattr(self.options, "per_class", None) or is_balanced(self.counts):
            return UNIFORM
        return UNIFORM if each_class and self.class_conditional else BY_FREQUENCY

    def generated(self, seed: int, each_class: bool = False) -> GeneratedImages:
        """Return images generated from a seed, kept until `clear`; labels as in `label_policy`."""
        key = (seed, self.label_policy(each_class))
        if key not in self._generated:
            index, objective = torch.arange(self.num_images), self.trained.objective
            choose_labels = uniform_labels if key[1] == UNIFORM else labels_by_frequency
            labels = choose_labels(len(index), self.counts)
            with progress(f"sampling from seed {seed}", self.num_images):
                parts = [
                    to_uint8(
                        sample_distributed(
                            self.engine, objective, self.nets, rows, labels[rows], seed
                        ),
                        objective.pixels,
                    )
                    for rows in index.split(_CHUNK)
                ]
            pixels = np.concatenate(parts)
            outputs = self.extractor.compute(self.engine, len(pixels), pixels.__getitem__)
            self._generated[key] = GeneratedImages(pixels, labels.numpy(), *outputs)
        return self._generated[key]

    def clear(self) -> None:
        """Free the generated images."""
        self._generated.clear()


def _build_settings(data: DataConfig, index: Index) -> DataConfig:
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


def add_study_options(parser: ArgumentParser, runs: str, folder: str) -> None:
    """Add the options that `denoise` and `explore` share; `folder` is the default of --out."""
    parser.add_argument("run", type=path_word, help=runs)
    parser.add_argument("--num_shown", type=int, default=10, help="of them on the sheets")
    parser.add_argument("--checkpoint", help="its images seen, or best; default the newest")
    parser.add_argument("--out", type=path_word, help=f"folder to write to; default RUN/{folder}")
    parser.add_argument("--epochs", type=int, help="of the classifier; default until 20,000 images")
    parser.add_argument("--seed", type=int, default=1, help="of classifier, images and draws")
    parser.add_argument(
        "--test_shards", type=path_word, help="real images; default as the run's source"
    )
