"""Trainers on a folder of images: messages, changes, hold-out, and runs used from other folders."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from errors import error_of
from PIL import Image
from tiny import LAUNCH
from trees import tree_of

from dgm.cli.assemble import DataConfig
from dgm.cli.preflight import find_shards

EVALUATE = LAUNCH / "evaluate.py"


@pytest.fixture
def work(tmp_path: Path, shape_pictures: Path) -> Path:
    """Make a folder to work in, with a copy of some pictures."""
    work = tmp_path / "work"
    for name in ("circle", "square", "star"):
        shutil.copytree(shape_pictures / name, work / "pictures" / name)
    return work


@pytest.fixture
def train(run_warm: Callable, tiny_configs: dict[str, Path], work: Path) -> Callable:
    """Return a function that trains a small VAE on the pictures, in the run folder `run`."""

    def start(*options: str, **more):
        words = ["--config", tiny_configs["vae"], "--run.dir=run", "--run.trackers=[]"]
        words += ["--data.source=folder:pictures", "--data.shards=null", "--data.test_shards=null"]
        words += ["--train.total_images=32", "--train.sample_every_images=0", *options]
        return run_warm(LAUNCH / "train_vae.py", *words, cwd=work, **more)

    return start


@pytest.mark.slow
def test_a_run_continues_only_with_the_images_of_its_folder(train: Callable, work: Path) -> None:
    done = train()
    assert done.code == 0, done.stderr
    [line] = [text for text in done.stdout.splitlines() if text.startswith("data: ")]
    [folder] = (work / "data").iterdir()
    expected = f"96 images, 3 classes, 32 x 32, data/{folder.name}, built 20"
    assert line.split(maxsplit=1)[1].startswith(expected)
    # Another configuration is refused before shards are built.
    before = tree_of(work / "data")
    assert "optim.lr was" in error_of(train("--data.resize=16", "--optim.lr=0.5"))
    assert tree_of(work / "data") == before
    for path in work.glob("pictures/circle/*.png"):
        os.utime(path, ns=(1, 1))
    touched = train("--train.total_images=64")
    assert touched.code == 0, touched.stderr
    assert "32 images changed: building again" in touched.stdout
    assert "continues at" in touched.stdout
    [shards] = (work / "data").iterdir()
    before = tree_of(work / "data")
    Image.new("RGB", (32, 32)).save(work / "pictures" / "star" / "new.png")
    changed = train("--train.total_images=96")
    assert "was trained on other images" in error_of(changed)
    assert ": 1 image added: building again" in changed.stdout
    assert tree_of(work / "data") == before
    done = train("--train.total_images=96", "--data.shards", shards)  # a remedy that is named
    assert done.code == 0, done.stderr


@pytest.mark.slow
def test_a_run_is_continued_and_evaluated_from_another_folder(
    train: Callable, run_warm: Callable, work: Path, tmp_path: Path
) -> None:
    measured = ["--eval.every_images=32", "--eval.metric=bits_per_dim", "--data.holdout=0.2"]
    done = train(*measured)
    assert done.code == 0, done.stderr
    data = yaml.safe_load((work / "run" / "config.yaml").read_text())["data"]
    assert data["source"] == f"folder:{work}/pictures" and Path(str(data["shards"])).is_absolute()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    words = ["--config", work / "run" / "config.yaml", "--run.dir", work / "run"]
    words += ["--train.total_images=64"]
    again = run_warm(LAUNCH / "train_vae.py", *words, cwd=elsewhere)
    assert again.code == 0, again.stderr
    assert "continues at" in again.stdout
    options = ["--metrics", "bits_per_dim", "--num_test", "8"]
    found = run_warm(EVALUATE, work / "run", *options, cwd=elsewhere)
    assert found.code == 0, found.stderr
    assert list(elsewhere.iterdir()) == []  # nothing was built a second time


def test_missing_test_images_name_what_works(train: Callable, work: Path) -> None:
    error = error_of(train("--eval.every_images=32", "--eval.metric=bits_per_dim"))
    for part in ("has no folder 'test'", "--data.holdout 0.1", f"{work}/pictures/train/"):
        assert part in error


@pytest.mark.slow
def test_metrics_on_test_images_are_left_out_if_there_are_none(
    train: Callable, run_warm: Callable, work: Path
) -> None:
    assert train().code == 0
    few = ["--num_images", "30", "--epochs", "1"]
    done = run_warm(EVALUATE, "run", *few, cwd=work)
    assert done.code == 0, done.stderr
    assert "left out: memorization, reconstruction, bits_per_dim, for lack of" in done.stdout
    assert "FD-classifier" in done.stdout
    error = error_of(run_warm(EVALUATE, "run", "--metrics", "bits_per_dim", *few, cwd=work))
    assert "there are no test images" in error and "--data.holdout 0.1" in error


@pytest.mark.slow
def test_hints_under_make_name_its_variable(train: Callable, work: Path) -> None:
    Image.new("RGB", (20, 20)).save(work / "pictures" / "star" / "new.png")
    assert 'ARGS="--data.resize 32"' in error_of(train(variables={"DGM_MAKE": "1"}))
    assert train("--data.resize", "32").code == 0


def test_the_makefile_says_that_make_started_a_trainer() -> None:
    command = ["make", "-s", "-o", "setup", "train", "BIN=printenv DGM_MAKE; true "]
    done = subprocess.run(command, cwd=LAUNCH.parent, capture_output=True, text=True, timeout=60)
    assert done.stdout == "1\n", done.stdout + done.stderr


@pytest.mark.slow
def test_damaged_and_transparent_images_can_be_trained_on(train: Callable, work: Path) -> None:
    (work / "pictures" / "star" / "bad.png").write_bytes(b"no picture")
    Image.new("RGBA", (32, 32)).save(work / "pictures" / "star" / "clear.png")
    done = train("--data.skip_bad", "--data.background=black")
    assert done.code == 0, done.stderr
    assert "left out: 1 damaged image (star/bad.png)" in done.stdout
    assert "1 image with transparent parts (star/clear.png) composited on black" in done.stdout
    [folder] = (work / "data").iterdir()
    assert folder.name.endswith("-background-0.0.0-skip-bad")
    again = train("--data.skip_bad", "--data.background=black", "--train.total_images=64")
    assert again.code == 0 and "97 images" in again.stdout and "left out" not in again.stdout


def test_shards_are_found_before_a_job_by_the_same_settings(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(work)
    data = DataConfig(source="folder:pictures", holdout=0.2)
    assert find_shards(data, "train", build=False) is None and not (work / "data").exists()
    found = [find_shards(data, split, build=True) for split in ("train", "test")]
    assert [len(shards or ()) > 0 for shards in found] == [True, True]
    assert sum(len(shards or ()) for shards in found) == 96
    assert find_shards(data, "train", build=False) is not None
