"""Training and evaluation on foreign tars: their labels, frequencies, checksums and sizes."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tars
from errors import error_of
from PIL import Image
from tiny import LAUNCH, SCRIPTS
from warm_processes import Result

from dgm.cli.assemble import former_ids, identify
from dgm.cli.sample import choose_shown
from dgm.training import checkpoint
from shards import shapes
from shards.reader import open_shards

pytestmark = pytest.mark.slow

COUNTS = {3: 36, 5: 4, 7: 8}  # images by label


def write_tar(path: Path, labels: list[int], first: int = 0, extension: str = "npy") -> Path:
    """Write a tar of shapes with these labels, and return its folder."""
    images = [
        shapes.render("train", number * 10 + label)
        for number, label in enumerate(labels, start=first)
    ]
    tars.write_tar(path, tars.members(images, labels, extension, first=first))
    return path.parent


@pytest.fixture(scope="module")
def train_tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    labels = [label for label, count in COUNTS.items() for _ in range(count)]
    return write_tar(tmp_path_factory.mktemp("foreign") / "train" / "a.tar", labels)


@pytest.fixture(scope="module")
def test_tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write test images, none of class 5, and return their folder."""
    labels = [3] * 12 + [7] * 12
    return write_tar(tmp_path_factory.mktemp("foreign") / "test" / "b.tar", labels, 500)


@pytest.fixture
def train(run_warm: Callable, tiny_configs: dict[str, Path], tmp_path: Path) -> Callable:
    """Return a function that trains a tiny VAE, without classes, or a GAN on given shards."""

    def run(
        shards: Path, *options: object, images: int = 32, family: str = "vae", name: str = "run"
    ) -> Result:
        words = ["--config", tiny_configs[family], "--run.dir", tmp_path / name]
        words += ["--data.shards", shards, f"--train.total_images={images}"]
        return run_warm(LAUNCH / SCRIPTS[family], *words, "--run.trackers=[]", *options)

    return run


def state_of(run: Path) -> dict[str, Any]:
    newest = checkpoint.newest(run / "checkpoints")
    assert newest is not None
    return checkpoint.read_state(newest)


def rewrite(run: Path, **changes: Any) -> None:
    """Change the state of the newest checkpoint, as an older version would have written it."""
    newest = checkpoint.newest(run / "checkpoints")
    assert newest is not None
    content = (json.dumps({**checkpoint.read_state(newest), **changes}) + "\n").encode()
    (newest / "state.json").write_bytes(content)
    manifest = json.loads((newest / checkpoint.MANIFEST).read_text())
    digest = hashlib.sha256(content).hexdigest()
    manifest["files"]["state.json"] = {"size": len(content), "sha256": digest}
    (newest / checkpoint.MANIFEST).write_text(json.dumps(manifest))


def former_id(count: int) -> str:
    return hashlib.sha256(f"{count}:".encode()).hexdigest()[:16]


def test_classes_are_those_that_occur(
    train: Callable, run_warm: Callable, train_tars: Path, test_tars: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    done = train(
        train_tars, "--train.samples_per_class=2", "--data.test_shards", test_tars, family="gan"
    )
    assert done.code == 0, done.stderr
    assert state_of(run)["classes"] == ["3", "5", "7"]
    with Image.open(sorted((run / "samples").glob("*.png"))[-1]) as sheet:
        assert sheet.size == (2 * 66 + 2, 3 * 66 + 2)
    words = ["--epochs", 1, "--num_images", 24, "--test_shards", test_tars, "--against", "train"]
    measures = "class_consistency,distances,precision_recall"
    done = run_warm(LAUNCH / "evaluate.py", run, *words, "--metrics", measures)
    assert done.code == 0, done.stderr
    found = json.loads((run / "evaluation.json").read_text())
    assert set(found["class_consistency"]["class_consistency_by_class"]) == {"3", "5", "7"}
    assert found["class_consistency"]["labels"] == "uniform"
    for name in ("distances_classifier", "precision_recall_classifier"):
        assert found[name]["labels"] == "by the training data's frequencies"
    assert "labels by the training data's frequencies" in done.stdout
    few = [word for word in words if word not in ("--num_images", 24)]
    done = run_warm(LAUNCH / "evaluate.py", run, *few, "--per_class", 8, "--metrics", "distances")
    assert done.code == 0, done.stderr
    found = json.loads((run / "evaluation.json").read_text())["distances_classifier"]
    assert found["labels"] == "uniform" and found["num_generated"] == 24
    done = run_warm(LAUNCH / "sample.py", run, "--classes", "7")
    assert done.code == 0, done.stderr


def test_a_run_whose_tars_had_no_checksums_continues(
    train: Callable, tmp_path: Path, test_tars: Path
) -> None:
    folder, run = tmp_path / "tars", tmp_path / "run"
    labels = [number % 3 for number in range(48)]
    write_tar(folder / "a.tar", labels)
    assert train(folder).code == 0
    strong = state_of(run)["data_id"]
    assert strong != former_id(48)
    rewrite(run, data_id=former_id(48))
    done = train(folder, images=48)
    assert done.code == 0, done.stderr
    assert state_of(run)["images_seen"] == 48 and state_of(run)["data_id"] == strong
    # The same number of other images is now detected.
    write_tar(folder / "a.tar", labels, first=900)
    assert "was trained on other images" in error_of(train(folder, images=64))
    # For another number of images, the old id differs too.
    write_tar(folder / "a.tar", labels[:-3])
    rewrite(run, data_id=former_id(48))
    assert "was trained on other images" in error_of(train(folder, images=64))


def test_a_run_with_other_label_numbers_is_refused_but_evaluated(
    train: Callable, run_warm: Callable, train_tars: Path, test_tars: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert train(train_tars, family="gan").code == 0
    rewrite(run, data_id=former_id(48), classes=["0", "3", "5"])
    line = error_of(train(train_tars, images=48, family="gan"))
    assert "was trained with other classes: 3 (0 to 5), while data.shards has 3 (3 to 7)" in line
    assert "use another run.dir" in line
    again = train(train_tars, images=48, family="vae", name="without")
    assert again.code == 0, again.stderr
    rewrite(tmp_path / "without", data_id=former_id(48), classes=["0", "3", "5"])
    # Nets that know no classes do not depend on their numbers.
    again = train(train_tars, images=64, family="vae", name="without")
    assert again.code == 0 and state_of(tmp_path / "without")["classes"] == ["3", "5", "7"]
    rewrite(run, classes=["7", "5", "3"])  # evaluated with the numbers of the checkpoint
    words = ["--epochs", 1, "--num_images", 24, "--test_shards", test_tars]
    done = run_warm(LAUNCH / "evaluate.py", run, *words, "--metrics", "class_consistency,distances")
    assert done.code == 0, done.stderr


@pytest.mark.parametrize("extension", ["npy", "png"])
def test_shards_are_resized(
    train: Callable, run_warm: Callable, tmp_path: Path, extension: str
) -> None:
    labels = [number % 3 for number in range(32)]
    data = write_tar(tmp_path / "tars" / "a.tar", labels, extension=extension)
    test = write_tar(tmp_path / "test" / "a.tar", labels, 700, extension)
    run, options = tmp_path / "run", ["--data.resize=16", "--eval.metric=bits_per_dim"]
    options += ["--eval.every_images=16", "--eval.num_images=4", "--data.test_shards", test]
    done = train(data, *options)
    assert done.code == 0, done.stderr
    assert state_of(run)["image_shape"] == [16, 16, 3]
    assert re.search(r"decoded copy of \S+/tars: \S+ \(32 images, ", done.stderr)
    config = (run / "config.yaml").read_text()
    assert f"shards: {data}" in config and "resize: 16" in config
    assert train(data, *options, images=48).code == 0
    words = ["--num_test", 4, "--metrics", "bits_per_dim"]
    done = run_warm(LAUNCH / "evaluate.py", run, *words)
    assert done.code == 0, done.stderr


def test_a_run_that_ignored_its_resize_is_evaluated_at_its_size(
    train: Callable, run_warm: Callable, train_tars: Path, test_tars: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert train(train_tars, "--data.test_shards", test_tars).code == 0
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(re.sub(r"resize: .*", "resize: 16", config))
    words = ["--num_test", 4, "--metrics", "bits_per_dim"]
    done = run_warm(LAUNCH / "evaluate.py", run, *words)
    assert done.code == 0, done.stderr


def test_many_classes_make_no_huge_sheet(train: Callable, tmp_path: Path) -> None:
    data = write_tar(tmp_path / "tars" / "a.tar", list(range(1, 101)))
    done = train(data, "--train.samples_per_class=2", images=16, family="gan")
    assert done.code == 0, done.stderr
    message = "samples/*.png show 62 of 100 classes, evenly spaced, and 2 images of each"
    assert message in done.stdout
    with Image.open(sorted((tmp_path / "run" / "samples").glob("*.png"))[-1]) as sheet:
        assert sheet.size == (2 * 66 + 2, 4094)
    # launch/sample.py shows rows of as many classes, or of as many images of a class, as fit.
    found = [choose_shown(100, per_class, 32, 32) for per_class in (1, 2)]
    assert [(len(shown), columns) for shown, columns in found] == [(100, 62), (2 * 62, 2)]


def test_ids_of_images_depend_on_checksums_and_class_numbers(
    train_tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    labels = [label for label, count in COUNTS.items() for _ in range(count)]
    other = write_tar(tmp_path / "other" / "a.tar", labels, first=300)
    shards, others = open_shards(train_tars), open_shards(other)
    assert len(shards) == len(others) and identify(shards) != identify(others)
    assert former_ids(shards) == former_ids(others) == (former_id(48),)
    assert identify(open_shards(train_tars, classes=shards.classes)) == identify(shards)
    assert identify(open_shards(train_tars, classes=("7", "5", "3"))) != identify(shards)
