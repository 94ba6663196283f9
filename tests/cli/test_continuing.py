"""A run continues with its own images only, and from configurations of older versions."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from shards.build import build
from tests.support.trees import tree_of

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ROOT / "launch" / "train_ddpm.py"


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
def run(run_warm: Callable, tiny_config: Path, tiny_shards: Path, tmp_path: Path) -> Path:
    """Train the smallest run, on a copy of the shards."""
    shards = tmp_path / "shards"
    shutil.copytree(tiny_shards, shards)
    words = ["--config", tiny_config, "--run.dir", tmp_path / "run", "--data.shards", shards]
    assert run_warm(TRAIN, *words).code == 0
    return tmp_path / "run"


@pytest.mark.slow
def test_a_refused_continuation_leaves_the_run_as_it_was(
    run: Path, run_warm: Callable, tiny_config: Path, other_shards: Path, tmp_path: Path
) -> None:
    (run / "checkpoints" / ".partial-000000999").mkdir()  # of a save that was killed
    before = tree_of(run)
    words = ["--config", tiny_config, "--run.dir", run, "--train.total_images=320"]
    done = run_warm(TRAIN, *words, "--data.shards", other_shards)
    assert done.code == 2
    assert done.stderr.startswith(f"error: run.dir {run} was trained on other images than")
    assert done.stderr.count("\n") == 1
    assert tree_of(run) == before
    done = run_warm(TRAIN, *words, "--data.shards", tmp_path / "shards")
    assert done.code == 0, done.stderr


@pytest.mark.slow
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
        done = run_warm(ROOT / "launch" / script, run, *options)
        assert done.code == 2, (script, done.stderr)
        assert f"{run} was trained on other images than data.shards {shards} holds" in done.stderr
        assert done.stderr.count("\n") == 1
    config = run / "config.yaml"  # the remedy of the message
    config.write_text(config.read_text().replace(str(shards), str(tmp_path / "moved")))
    words = [run, "--metrics", "loss_by_timestep", "--num_test", 8]
    done = run_warm(ROOT / "launch" / "evaluate.py", *words)
    assert done.code == 0, done.stderr


@pytest.mark.slow
def test_a_run_of_an_older_version_continues_with_the_defaults_of_newer_keys(
    run: Path, run_warm: Callable, tiny_config: Path, tmp_path: Path
) -> None:
    config = run / "config.yaml"
    lines = config.read_text().splitlines(keepends=True)
    newer = ("  deterministic:", "  tf32:", "  dropout:", "  learned_variance:", "  shift:")
    older = [line for line in lines if not line.startswith(newer)]
    assert len(lines) - 5 <= len(older) < len(lines)
    config.write_text("".join(older))
    done = run_warm(ROOT / "launch" / "sample.py", run)
    assert done.code == 0, done.stderr
    words = ["--config", tiny_config, "--run.dir", run, "--data.shards", tmp_path / "shards"]
    done = run_warm(TRAIN, *words, "--train.total_images=320")
    assert done.code == 0, done.stderr
    assert "dropout" in config.read_text()
