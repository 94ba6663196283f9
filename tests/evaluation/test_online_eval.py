"""Evaluation during training, bits per dimension, and the classifier of the real images."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from array_images import ArrayImages
from torch import Tensor

from dgm.evaluation import classifier, online_eval
from dgm.evaluation.class_labels import labels_by_frequency
from dgm.evaluation.classifier import Classifier, cached_classifier, classify, train_classifier
from dgm.evaluation.likelihood import ImageSubset, bits_per_dim
from dgm.evaluation.online_eval import EvalConfig, RealImages, make_evaluation
from dgm.objective import Batch, Nets
from dgm.preprocessing import STANDARD
from dgm.rng import Draws
from dgm.training.engine import Engine
from shards import shapes


def two_shapes(count: int) -> ArrayImages:
    """Return images of two classes that are easy to tell apart: circles and bars."""
    kinds = [i for i in range(10 * count) if i % 10 in (0, 9)][: 2 * count]
    pixels = np.stack([shapes.render("train", i) for i in kinds])
    return ArrayImages(pixels, np.arange(len(kinds)) % 2)


class Brightness:
    """A family whose -log p is an image's brightness plus 3; its samples are grey."""

    exact = True
    num_classes = None
    pixels = STANDARD

    def nats(self, nets: Nets, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        light = batch.images.double().mean((1, 2, 3))
        return {"light": light, "rest": torch.full_like(light, 3)}

    def sample(self, nets: Nets, count: int, labels: Any, draws: Draws) -> Tensor:
        return torch.zeros(count, 3, 32, 32)


class Copies(Brightness):
    """A family whose samples are the images of a data set."""

    def __init__(self, data: ArrayImages):
        self.data = data

    def sample(self, nets: Nets, count: int, labels: Any, draws: Draws) -> Tensor:
        pixels = torch.from_numpy(self.data.images(draws.index.numpy() % len(self.data)))
        return pixels.permute(0, 3, 1, 2) / 127.5 - 1


def test_bits_per_dim_are_nats_over_dimensions_and_ln_2(engine: Engine):
    data, index = two_shapes(8), torch.tensor([3, 0, 7, 12, 5])
    found = bits_per_dim(Brightness(), {}, ImageSubset(engine, data, index, 0, batch=2))
    nats = data.images(index.numpy()).astype(float).mean((1, 2, 3)) + 3
    bits = nats / (32 * 32 * 3 * math.log(2))
    assert found["exact"] == pytest.approx(bits.mean())
    assert found["error"] == pytest.approx(bits.std(ddof=1) / math.sqrt(5))
    assert found["light"] + found["rest"] == pytest.approx(found["exact"])


def real(data: ArrayImages) -> RealImages:
    return RealImages(data, 2, "two-shapes", lambda: data)


def test_nothing_is_evaluated_by_default(engine: Engine, tmp_path: Path):
    data = real(two_shapes(2))
    assert make_evaluation(EvalConfig(), Brightness(), engine, data, tmp_path) is None


def test_likelihood_is_that_of_test_images(engine: Engine, tmp_path: Path):
    config = EvalConfig(every_images=1, metric="bits_per_dim", num_images=6)
    data = two_shapes(4)
    evaluate = make_evaluation(config, Brightness(), engine, real(data), tmp_path)
    assert evaluate is not None
    found = evaluate({})
    assert list(found) == ["eval/bits_per_dim_exact"]
    assert found == evaluate({})


@pytest.mark.slow
def test_samples_like_the_real_images_are_nearer_than_others(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(online_eval, "default_epochs", lambda data: 8)
    config, data = EvalConfig(every_images=1, num_images=60), two_shapes(60)
    distances = []
    for family in (Copies(data), Brightness()):
        evaluate = make_evaluation(config, family, engine, real(data), tmp_path)
        assert evaluate is not None
        distances.append(evaluate({})["eval/fd_classifier"])
    assert distances[0] < 0.05 * distances[1]


@pytest.mark.slow
def test_samples_of_online_evaluation_follow_the_frequencies(
    engine: Engine, tmp_path: Path
) -> None:
    class Recording(Brightness):
        num_classes, sample_config = 3, SimpleNamespace(batch=100)
        recorded: ClassVar[list[int]] = []

        def sample(self, nets: Nets, count: int, labels: Any, draws: Draws) -> Tensor:
            self.recorded.extend(labels.tolist())
            return draws.normal("x", (3, 8, 8)).clamp(-1, 1)

    objective: Any = Recording()
    pixels = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3), np.uint8)
    data = ArrayImages(pixels, np.where(np.arange(60) < 45, 2, 0))
    config = EvalConfig(every_images=1, num_images=20)
    evaluate = make_evaluation(
        config, objective, engine, RealImages(data, 3, "few", lambda: data), tmp_path
    )
    assert evaluate is not None and evaluate({})["eval/fd_classifier"] > 0
    assert objective.recorded == labels_by_frequency(20, np.array([15, 0, 45])).tolist()
    assert np.bincount(objective.recorded).tolist() == [5, 0, 15]


@pytest.mark.slow
def test_classifier_is_trained_once_for_a_data_set(engine: Engine, tmp_path: Path):
    data = two_shapes(60)
    nets, written = [], []
    for _ in range(2):
        nets.append(cached_classifier(engine, tmp_path, data, "id", 2, 8, 0))
        (path,) = tmp_path.iterdir()
        written.append(path.stat().st_mtime_ns)
    assert written[0] == written[1]
    assert all(
        torch.equal(a, b)
        for a, b in zip(nets[0].state_dict().values(), nets[1].state_dict().values(), strict=True)
    )
    index = np.arange(len(data))
    assert (classify(nets[1], data.images(index)) == data.labels(index)).mean() > 0.9
    whole = path.read_bytes()
    path.write_bytes(whole[:100])  # damaged: replaced
    cached_classifier(engine, tmp_path, data, "id", 2, 8, 0)
    assert path.read_bytes() == whole


def test_training_a_classifier_does_not_change_the_global_random_state(
    tmp_path: Path, engine: Engine
):
    data = two_shapes(4)
    torch.manual_seed(5)
    expected = Classifier(2).state_dict()
    torch.manual_seed(77)
    state = torch.get_rng_state()
    for name, value in classifier._initialized(2, 5).state_dict().items():
        assert torch.equal(value, expected[name]), name  # as by the global seed
    train_classifier(data, 2, 1, 5, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), state)
    cached_classifier(engine, tmp_path, data, "id", 2, 1, 5)  # which also reads it from the file
    assert torch.equal(torch.get_rng_state(), state)
