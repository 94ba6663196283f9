"""Sweeps: which sets a file names, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from dgm.common.errors import UserError
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


def test_values_that_are_lists_or_words_can_be_in_a_grid(written) -> None:
    path = written("grid:\n  model.channel_mult: [[1, 2], [1, 2, 2]]\n  train.compile: [none]\n")
    found = read_sweep(path)
    assert list(found) == ["channel_mult=1_2-compile=none", "channel_mult=1_2_2-compile=none"]
    keys = found["channel_mult=1_2-compile=none"]
    assert words_of(keys) == ["--model.channel_mult=[1, 2]", "--train.compile=none"]


def test_values_are_written_as_the_trainers_read_them() -> None:
    words = words_of({"a": None, "b": True, "c": 1e-5, "d": "cifar10"})
    assert words == ["--a=null", "--b=true", "--c=1e-05", "--d=cifar10"]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["needs the sections sets, grid or both"]),
        ("sets: {a: {}}\nlr: 3\n", ["no others"]),
        ("sets: {}\n", ["sets is {}"]),
        ("sets: {a: 3}\n", ["the set a is 3"]),
        ("sets:\n  a: {optim.lr: 1}\n  a: {optim.lr: 2}\n", ["gives a twice, in lines 2 and 3"]),
        ("grid: {optim.lr: 3}\n", ["optim.lr of the grid is 3"]),
        ("grid: {optim.lr: []}\n", ["optim.lr of the grid is []"]),
        ("grid: {optim.lr: [1, 1]}\n", ["two sets lr=1"]),
        ("grid: {optim.lr: [1], vae.lr: [2]}\nsets: {../up: {}}\n", ["'../up-lr=1-lr=2'"]),
        ("sets: [\n", ["is not YAML"]),
    ],
)
def test_mistakes_in_a_sweep_name_themselves(written, text: str, parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        read_sweep(written(text))
    assert all(part in str(caught.value) for part in ["sweep.yaml", *parts]), caught.value
    assert "\n" not in str(caught.value)


def test_sweep_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing\.yaml cannot be read"):
        read_sweep(tmp_path / "nothing.yaml")


def test_sweeps_that_come_along_can_be_read() -> None:
    for path in (Path(__file__).parents[2] / "slurm" / "sweeps").glob("*.yaml"):
        assert len(read_sweep(path)) > 1
