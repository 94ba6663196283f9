"""A run continues with its own images only, and from configurations of older versions."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from errors import error_of
from tiny import LAUNCH

from shards.build import build

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def other_shards(shape_pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build shards of half of the shapes, in the same classes."""
    pictures = tmp_path_factory.mktemp("half") / "pictures"
    shutil.copytree(shape_pictures, pictures)
    for folder in pictures.iterdir():
        for path in sorted(folder.iterdir())[::2]:
            path.unlink()
    out = tmp_path_factory.mktemp("other") / "train"
    build(f"folder:{pictures}", "train", out, shard_size=90, progress=False)
    return out


@pytest.fixture
def run(train: Callable, tiny_shards: Path, tmp_path: Path) -> Path:
    """Train the smallest run, on a copy of the shards."""
    shutil.copytree(tiny_shards, tmp_path / "shards")
    assert train("--data.shards", tmp_path / "shards", family="diffusion").code == 0
    return tmp_path / "run"


def test_tools_refuse_other_images_than_those_of_the_checkpoint(
    run: Path, run_warm: Callable, other_shards: Path, tmp_path: Path
) -> None:
    shards = tmp_path / "shards"
    shards.rename(tmp_path / "moved")
    shutil.copytree(other_shards, shards)
    for script, *options in (
        ("evaluate.py", "--metrics", "distances", "--num_images", 40),
        ("denoise.py",),
        ("explore.py",),
    ):
        error = error_of(run_warm(LAUNCH / script, run, *options))
        assert f"{run} was trained on other images than data.shards {shards} holds" in error
    config = run / "config.yaml"  # the remedy of the message
    config.write_text(config.read_text().replace(str(shards), str(tmp_path / "moved")))
    words = [run, "--metrics", "loss_by_timestep", "--num_test", 8]
    done = run_warm(LAUNCH / "evaluate.py", *words)
    assert done.code == 0, done.stderr


def test_a_run_of_an_older_version_continues_with_the_defaults_of_newer_keys(
    run: Path, train: Callable, run_warm: Callable, tmp_path: Path
) -> None:
    config = run / "config.yaml"
    lines = config.read_text().splitlines(keepends=True)
    newer = ("  deterministic:", "  tf32:", "  dropout:", "  learned_variance:", "  shift:")
    older = [line for line in lines if not line.startswith(newer)]
    assert len(lines) - 5 <= len(older) < len(lines)
    config.write_text("".join(older))
    done = run_warm(LAUNCH / "sample.py", run)
    assert done.code == 0, done.stderr
    options = ["--data.shards", tmp_path / "shards", "--train.total_images=320"]
    done = train(*options, family="diffusion")
    assert done.code == 0, done.stderr
    assert "dropout" in config.read_text()
