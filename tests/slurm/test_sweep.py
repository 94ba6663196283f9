"""Sweeps: the sets and grids of a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from slurm.sweep import read_sweep, words_of


@pytest.fixture
def written(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "sweep.yaml"
        path.write_text(text)
        return path

    return write


def test_sets_and_grid_make_each_combination(written) -> None:
    path = written(
        "sets:\n  plain: {}\n  warm: {optim: {warmup_images: 100}}\n"
        "grid:\n  optim.lr: [1e-3, 0.002]\n  run.seed: [0, 1]\n"
    )
    found = read_sweep(path)
    assert len(found) == 8
    assert found["warm-lr=0.002-seed=1"] == {
        "optim.warmup_images": 100,
        "optim.lr": 0.002,
        "run.seed": 1,
    }
    assert found["plain-lr=0.001-seed=0"] == {"optim.lr": 0.001, "run.seed": 0}


def test_a_grid_may_have_lists_and_strings(written) -> None:
    path = written("grid:\n  model.channel_mult: [[1, 2], [1, 2, 2]]\n  train.compile: [none]\n")
    found = read_sweep(path)
    assert list(found) == ["channel_mult=1_2-compile=none", "channel_mult=1_2_2-compile=none"]
    keys = found["channel_mult=1_2-compile=none"]
    assert words_of(keys) == ["--model.channel_mult=[1, 2]", "--train.compile=none"]


def test_values_are_written_as_the_trainers_read_them() -> None:
    words = words_of({"a": None, "b": True, "c": 1e-5, "d": "cifar10"})
    assert words == ["--a=null", "--b=true", "--c=1e-05", "--d=cifar10"]


def test_included_sweeps_can_be_read() -> None:
    for path in (Path(__file__).parents[2] / "slurm" / "sweeps").glob("*.yaml"):
        assert len(read_sweep(path)) > 1
