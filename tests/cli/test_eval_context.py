"""The measures of a model that gives back real images, where every figure is known."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dgm.cli import eval_context, evaluate, sample_metrics
from dgm.cli.eval_context import Subject
from dgm.cli.load_run import Trained
from dgm.cli.metric_selection import choose_measures
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
    """A family that makes the images of a data set: the k-th of a class asked for."""

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
        place = draws.index.numpy() // 10 % self.rows.shape[1]
        pixels = torch.from_numpy(self.data.images(self.rows[labels.numpy(), place]))
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


def make(
    tiny_shards: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, *words: str,
    conditional: bool = True,
) -> Subject:  # fmt: skip
    for name in ("MASTER_ADDR", "RANK", "WORLD_SIZE", "LOCAL_RANK", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(eval_context, "cache_root", lambda: cache / "cache")
    given = ["run", "--epochs", "1", "--test_shards", str(tiny_shards), *words]
    options = evaluate.make_parser().parse_args(given)
    evaluate.check(options)
    data = open_shards(tiny_shards)
    family: Any = Copies(data, conditional)
    trained = Trained("gan", family, {}, list(data.classes), 0)
    settings = {"source": "shapes", "resize": None, "test_shards": None}
    return Subject(options, Engine("no"), trained, data, settings, cache)


def test_real_images_get_the_figures_of_real_images(
    tiny_shards: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    made = make(tiny_shards, cache, monkeypatch, "--num_images", "320", "--seeds", "2")
    names = choose_measures(made)
    assert names == [
        "class_consistency", "distances", "precision_recall", "diversity", "neighbours"
    ]  # fmt: skip
    found = evaluate.measure(made, names)
    consistency = found["class_consistency"]
    rows = np.arange(len(made.test))
    accuracy = (classify(made.classifier, made.test.images(rows)) == made.test.labels(rows)).mean()
    # The very images of the test set, each once.
    assert consistency["class_consistency"] == pytest.approx(accuracy)
    assert consistency["classifier_accuracy_on_real_test_images"] == pytest.approx(accuracy)
    assert 0 < accuracy < 1  # so that it can be told from another
    far = found["distances_cifar"]
    assert far["fd_cifar"] == pytest.approx(0, abs=1e-6) and far["num_real"] == 320
    assert far["spread_over_seeds"]["fd_cifar"] == pytest.approx(0, abs=1e-6)
    assert [own["score_cifar"] for own in far["by_seed"]] == [far["score_cifar"]] * 2
    both = found["precision_recall_cifar"]
    assert both["precision_cifar"] == both["recall_cifar"] == both["coverage_cifar"] == 1
    various = found["diversity_cifar"]
    assert various["diversity"] == pytest.approx(1) and various["least_coverage_of_a_class"] == 1
    near = found["neighbours_cifar"]
    assert near["distance_in_pixels"] == pytest.approx(0, abs=1e-4)
    assert (cache / near["sheet"]).is_file() and near["num_test"] == 320


def test_other_peoples_train_shards_have_no_test_images_of_another_source(
    tiny_shards: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    made = make(tiny_shards, cache, monkeypatch)
    for path in tiny_shards.glob("*.tar"):
        (tmp_path / path.name).symlink_to(path)
    made.real, made.options.test_shards = open_shards(tmp_path), None
    made.settings = {"source": "shapes", "shards": str(tmp_path)}  # whose images are others
    assert f"trained on tar:{tmp_path}" in str(made.lacks_test)
    assert choose_measures(made) == ["distances", "precision_recall", "diversity"]
    with pytest.raises(UserError, match=r"there are no test images: .* give --test_shards DIR"):
        _ = made.test


def test_images_of_one_class_only_are_seen(
    tiny_shards: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    made = make(tiny_shards, cache, monkeypatch, "--num_images", "60", conditional=False)
    family: Any = made.trained.objective
    family.rows = np.tile(family.rows[:1], (10, 1))  # circles, whatever is asked for
    found = sample_metrics.diversity(made)
    assert found["classes_are"] == "seen by the classifier"
    assert max(found["share_by_class"].values()) > 0.5
    assert sum(found["share_by_class"].values()) == pytest.approx(1)
    assert found["least_coverage_of_a_class"] == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--num_images", "9", "--metrics", "distances"], "9 generated.*few for distances.* 10 or"),
        (["--num_images", "5", "--metrics", "precision_recall"], "few for precision_recall.* 6 or"),
        (["--per_class", "1", "--metrics", "diversity"], "10 generated .* few for diversity.* 20"),
        (["--metrics", "bits_per_dim"], "no likelihood"),
        (["--metrics", "loss_by_timestep"], "holds a gan run, which has no timesteps"),
        (["--metrics", "bits_per_dim_ode"], "holds a gan run, which has no timesteps"),
        (["--metrics", "beauty"], "names 'beauty': choose of class_consistency, distances"),
    ],
)
def test_what_cannot_be_measured_is_said_before_any_work(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], said: str
):
    with pytest.raises(UserError, match=said):
        choose_measures(make(tiny_shards, tmp_path, monkeypatch, *words))
    assert not list(tmp_path.iterdir())


def test_too_few_real_images_are_named(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    made = make(tiny_shards, tmp_path, monkeypatch, "--against", "test", "--metrics", "diversity")
    few = SimpleNamespace(
        folder="few", classes=made.real.classes, num_classes=10,
        labels=lambda rows: np.arange(len(rows)) % 10,
    )  # fmt: skip
    for count, said in (
        (5, "few holds 5 images, too few for diversity: 6"),
        (59, "few holds 5 images of class .*, too few for diversity"),
    ):
        made.__dict__["test"] = type("Few", (SimpleNamespace,), {"__len__": lambda _, n=count: n})(
            **vars(few)
        )  # fmt: skip
        with pytest.raises(UserError, match=said):
            choose_measures(made)


def test_labels_follow_the_frequencies_of_the_data(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape_pictures: Path
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
        made = make(tiny_shards, tmp_path, monkeypatch, *own)
        made.real = data
        made.trained.classes = list(data.classes)
        made.trained.objective = Grey()
        assert np.bincount(made.made(1).labels).tolist() == rows
        assert np.bincount(made.made(1, each_class=True).labels).tolist() == each
        assert made.labels_are() == chosen and made.labels_are(each_class=True) == UNIFORM
        assert (made.made(1) is made.made(1, each_class=True)) == (chosen == UNIFORM)
        made.trained.objective.num_classes = None  # no class is asked for: one set serves all
        assert made.labels_are(each_class=True) == chosen
