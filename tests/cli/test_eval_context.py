"""Metrics of a model whose samples are real images, so that every value is known."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from array_images import ArrayImages
from torch import Tensor

from dgm.cli import eval_context, evaluate
from dgm.cli.eval_context import EvalContext
from dgm.cli.load_run import TrainedRun
from dgm.cli.metric_groups import compute_metrics
from dgm.cli.metric_selection import choose_metrics
from dgm.common.errors import UserError
from dgm.evaluation.class_labels import BY_FREQUENCY, UNIFORM
from dgm.evaluation.classifier import classify
from dgm.objective import Nets
from dgm.preprocessing import STANDARD
from dgm.rng import Draws
from dgm.training.engine import Engine
from shards.build import build
from shards.reader import Shards, open_shards

pytestmark = pytest.mark.slow


class Copies:
    """A family whose samples are images of a data set: image k of the requested class."""

    sample_config = SimpleNamespace(batch=100)
    pixels = STANDARD

    def __init__(self, data: Shards, conditional: bool):
        self.num_classes = 10 if conditional else None
        labels = data.labels(np.arange(len(data)))
        rows = [np.flatnonzero(labels == label) for label in range(10)]
        self.rows = np.stack([own[: min(map(len, rows))] for own in rows])
        self.data = data

    def sample(
        self, nets: Nets, count: int, labels: Tensor | None, draws: Draws, **knobs: Any
    ) -> Tensor:
        assert labels is not None
        number = draws.index.numpy() // 10 % self.rows.shape[1]
        pixels = torch.from_numpy(self.data.images(self.rows[labels.numpy(), number]))
        return pixels.permute(0, 3, 1, 2) / 127.5 - 1


class Grey:
    """A family whose images are grey."""

    sample_config = SimpleNamespace(batch=100)
    pixels = STANDARD
    num_classes: int | None = 3

    def sample(
        self, nets: Nets, count: int, labels: Tensor | None, draws: Draws, **knobs: Any
    ) -> Tensor:
        return torch.zeros(count, 3, 32, 32)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def make(
    tiny_shards: Path, cache: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., EvalContext]:
    """Return a maker of contexts whose caches and sheets are in `folder`."""

    def made(*words: str, conditional: bool = True, folder: Path = cache) -> EvalContext:
        monkeypatch.setattr(eval_context, "cache_root", lambda: folder / "cache")
        given = ["run", "--epochs", "1", "--test_shards", str(tiny_shards), *words]
        options = evaluate.make_parser().parse_args(given)
        evaluate.check(options)
        data = open_shards(tiny_shards)
        family: Any = Copies(data, conditional)
        trained = TrainedRun("gan", family, {}, list(data.classes), 0)
        settings = {"source": "shapes", "resize": None, "test_shards": None}
        return EvalContext(options, engine, trained, data, settings, folder)

    return made


def test_metrics_of_real_images_are_known(make: Callable, cache: Path):
    context = make("--num_images", "320", "--seeds", "2")
    names = choose_metrics(context)
    assert names == [
        "class_consistency", "distances", "precision_recall", "diversity", "memorization"
    ]  # fmt: skip
    found = evaluate.evaluate(context, names)
    consistency = found["class_consistency"]
    rows = np.arange(len(context.test))
    predicted = classify(context.classifier, context.test.images(rows))
    accuracy = (predicted == context.test.labels(rows)).mean()
    # The generated images are those of the test set.
    assert consistency["class_consistency"] == pytest.approx(accuracy)
    assert consistency["classifier_accuracy_on_real_test_images"] == pytest.approx(accuracy)
    assert 0 < accuracy < 1  # not trivial
    far = found["distances_classifier"]
    assert far["fd_classifier"] == pytest.approx(0, abs=1e-6) and far["num_real"] == 320
    assert far["spread_over_seeds"]["fd_classifier"] == pytest.approx(0, abs=1e-6)
    assert [own["score_classifier"] for own in far["by_seed"]] == [far["score_classifier"]] * 2
    both = found["precision_recall_classifier"]
    assert (
        both["precision_classifier"]
        == both["recall_classifier"]
        == both["coverage_classifier"]
        == 1
    )
    various = found["diversity_classifier"]
    assert various["diversity"] == pytest.approx(1) and various["min_coverage_of_a_class"] == 1
    near = found["memorization_classifier"]
    assert near["distance_in_pixels"] == pytest.approx(0, abs=1e-4)
    assert (cache / near["sheet"]).is_file() and near["num_test"] == 320


def test_foreign_train_shards_have_no_test_images_of_another_source(
    make: Callable, tiny_shards: Path, tmp_path: Path
):
    context = make()
    for path in tiny_shards.glob("*.tar"):
        (tmp_path / path.name).symlink_to(path)
    context.train, context.options.test_shards = open_shards(tmp_path), None
    context.settings = {"source": "shapes", "shards": str(tmp_path)}  # of other images
    assert f"trained on tar:{tmp_path}" in str(context.why_no_test)
    assert choose_metrics(context) == ["distances", "precision_recall", "diversity"]
    with pytest.raises(UserError, match=r"there are no test images: .* give --test_shards DIR"):
        _ = context.test


def test_images_of_one_class_only_are_detected(make: Callable):
    context = make("--num_images", "60", conditional=False)
    family: Any = context.trained.objective
    family.rows = np.tile(family.rows[:1], (10, 1))  # circles, whatever the label
    found = compute_metrics(context, "diversity")[1]
    assert found["classes_are"] == "seen by the classifier"
    assert max(found["fraction_by_class"].values()) > 0.5
    assert sum(found["fraction_by_class"].values()) == pytest.approx(1)
    assert found["min_coverage_of_a_class"] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num_images", "9", "--metrics", "distances"], "9 generated.*few for distances.* 10 or"),
        (["--num_images", "5", "--metrics", "precision_recall"], "few for precision_recall.* 6 or"),
        (["--per_class", "1", "--metrics", "diversity"], "10 generated .* few for diversity.* 20"),
        (["--metrics", "neighbours"], "names 'neighbours': give --metrics memorization"),
    ],
)
def test_too_few_images_are_an_error_before_any_work(
    make: Callable, tmp_path: Path, words: list[str], message: str
):
    with pytest.raises(UserError, match=message):
        choose_metrics(make(*words, folder=tmp_path))
    assert not list(tmp_path.iterdir())


def test_too_few_real_images_are_named(make: Callable):
    context = make("--against", "test", "--metrics", "diversity")

    class Few(ArrayImages):
        folder, classes, num_classes = "few", context.train.classes, 10

    for count, message in (
        (5, "few holds 5 images, too few for diversity: it needs 6"),
        (59, "few holds 5 images of class .*, too few for diversity"),
    ):
        context.__dict__["test"] = Few(np.empty(count), np.arange(count) % 10)
        with pytest.raises(UserError, match=message):
            choose_metrics(context)


def test_labels_follow_the_frequencies_of_the_data(
    make: Callable, tmp_path: Path, shape_pictures: Path
):
    few = tmp_path / "few"
    for name, count in (("circle", 12), ("square", 4), ("cross", 4)):
        folder = next(path for path in shape_pictures.iterdir() if path.name.startswith(name[:4]))
        (few / name).mkdir(parents=True)
        for picture in sorted(folder.iterdir())[:count]:
            shutil.copy(picture, few / name)
    build(f"folder:{few}", "train", tmp_path / "shards", progress=False)
    data = open_shards(tmp_path / "shards")
    words = ["--num_images", "10"]
    for own, rows, each, chosen in (
        (words, [6, 2, 2], [4, 3, 3], BY_FREQUENCY),
        (["--per_class", "3"], [3, 3, 3], [3, 3, 3], UNIFORM),
    ):
        context = make(*own, folder=tmp_path)
        context.train = data
        context.trained.classes = list(data.classes)
        context.trained.objective = Grey()
        assert np.bincount(context.generated(1).labels).tolist() == rows
        assert np.bincount(context.generated(1, each_class=True).labels).tolist() == each
        assert context.label_policy() == chosen and context.label_policy(each_class=True) == UNIFORM
        same = context.generated(1) is context.generated(1, each_class=True)
        assert same == (chosen == UNIFORM)
        context.trained.objective.num_classes = None  # unconditional: one set for all metrics
        assert context.label_policy(each_class=True) == chosen
