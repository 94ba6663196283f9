"""`launch/sample.py` and `launch/evaluate.py` on a tiny trained run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
SAMPLE, EVALUATE = ROOT / "launch" / "sample.py", ROOT / "launch" / "evaluate.py"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(
    run_warm: Callable, tiny_config: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Train the tiny configuration."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    script = ROOT / "launch" / "train_ddpm.py"
    done = run_warm(script, "--config", tiny_config, "--run.dir", folder)
    assert done.code == 0, done.stderr
    return folder


def arrays(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return file["arr_0"], file["arr_1"]


def test_one_image_per_class_by_default(run_warm: Callable, trained: Path, tmp_path: Path) -> None:
    done = run_warm(SAMPLE, trained, "--out", tmp_path / "one")
    assert done.code == 0, done.stderr
    pixels, labels = arrays(tmp_path / "one.npz")
    assert pixels.shape == (10, 32, 32, 3) and pixels.dtype == np.uint8
    assert labels.tolist() == list(range(10))
    width, height = Image.open(tmp_path / "one.png").size
    assert width > 9 * height  # one row of ten


def test_image_k_of_a_class_is_the_same_whatever_the_batch_count_and_processes(
    run_warm: Callable, trained: Path, tmp_path: Path
) -> None:
    ways: dict[str, tuple[list[object], int]] = {
        "whole": (["--per_class", 4], 1),
        "batches_of_3": (["--per_class", 4, "--batch", 3], 1),
        "two_processes": (["--per_class", 4], 2),
        "other_count": (["--per_class", 2], 1),
    }
    made = {}
    for name, (options, processes) in ways.items():
        out = tmp_path / name
        done = run_warm(SAMPLE, trained, "--steps", 3, "--out", out, *options, processes=processes)
        assert done.code == 0, done.stderr
        made[name] = arrays(out.with_name(name + ".npz"))[0].reshape(10, -1, 32, 32, 3)
    whole = made.pop("whole").astype(int)
    assert np.abs(whole[:, 0] - whole[:, 1]).max() > 20  # images of a class differ
    for name, images in made.items():
        # Another batch size may round differently, which one grey level bounds.
        difference = np.abs(whole[:, : images.shape[1]] - images.astype(int))
        assert difference.max() <= 1, name


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp_2m", "heun"])
def test_every_sampler_makes_the_classes_asked_for(
    run_warm: Callable, trained: Path, tmp_path: Path, sampler: str
) -> None:
    options = ["--sampler", sampler, "--steps", 3, "--guidance", 2, "--classes", "3, 7"]
    done = run_warm(SAMPLE, trained, "--per_class", 2, "--out", tmp_path / "some", *options)
    assert done.code == 0, done.stderr
    pixels, labels = arrays(tmp_path / "some.npz")
    assert labels.tolist() == [3, 3, 7, 7] and pixels.std() > 5


def test_mistakes_are_one_line(run_warm: Callable, trained: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    mistakes = {
        (empty,): "no config.yaml",
        (trained, "--steps", 5000): "sample.steps is 5000",
        (trained, "--per_class", 0): "--per_class is 0",
        (trained, "--classes", "unicorn"): "unicorn",
        (trained, "--checkpoint", 7): "000000007",
        (trained, "--sampler", "magic"): "magic",
        (trained, "--batch", 0): "sample.batch is 0",
    }
    for words, named in mistakes.items():
        done = run_warm(SAMPLE, *words, "--out", tmp_path / "none" / "x")
        lines = done.stderr.strip().splitlines()
        assert done.code == 2, (words, done.stderr)
        assert len(lines) == 1 and lines[0].startswith("error: ") and named in lines[0], lines
        assert not (tmp_path / "none").exists()


def test_evaluation_judges_real_and_generated_images(
    run_warm: Callable, trained: Path, tiny_shards: Path
) -> None:
    options = ["--per_class", 3, "--epochs", 1, "--test_shards", tiny_shards]
    options += ["--measure", "class_consistency"]
    done = run_warm(EVALUATE, trained, *options)
    assert done.code == 0, done.stderr
    evaluation = json.loads((trained / "evaluation.json").read_text())
    found = evaluation["class_consistency"]
    assert found["num_generated"] == 30 and evaluation["images_seen"] == 256
    by_class = found["class_consistency_by_class"]
    assert found["class_consistency"] == pytest.approx(np.mean(list(by_class.values())))
    assert "class consistency by class" in done.stdout
