"""The Python API, as the notebook uses it, and its errors."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import dgm
from dgm.cli.parser import TRAINERS
from dgm.common.errors import UserError
from shards import shapes

KEYS = {"train.total_images": 64, "run.trackers": []}


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Return images of shapes; their shards are written to the test's folder."""
    monkeypatch.setenv("DGM_DATA", str(tmp_path / "data"))
    return np.stack([shapes.render("train", k) for k in range(48)])


LABELS = np.arange(48) % 3


def train(family: str, images: np.ndarray, out: Path, **more) -> dgm.Run:
    config = f"{family}_tiny.yaml"
    return dgm.train(family, images, LABELS, out=out, config=config, **{**KEYS, **more})


@pytest.mark.slow
@pytest.mark.parametrize("family", TRAINERS.values())
def test_a_run_is_trained_and_loaded(family: str, images: np.ndarray, tmp_path: Path):
    run = train(family, images, tmp_path / "run")
    assert run.images_seen == 64 and run.image_shape == (32, 32, 3) and len(run.classes) == 3
    made = run.sample(5, labels=[2] * 5)
    assert made.dtype == torch.uint8 and made.shape == (5, 32, 32, 3)
    again = dgm.load(tmp_path / "run").sample(5, labels=[2] * 5, batch=2)
    assert (made.int() - again.int()).abs().max() <= 1  # batches round differently
    columns = run.history()
    assert columns["images_seen"] == [16, 32, 48, 64]
    assert {len(column) for column in columns.values()} == {4}
    assert any(math.isfinite(value) for key in columns for value in columns[key])
    assert run.config["train.total_images"] == 64


@pytest.mark.slow
def test_the_same_call_resumes(images: np.ndarray, tmp_path: Path):
    train("vae", images, tmp_path / "run")
    run = train("vae", images, tmp_path / "run", **{"train.total_images": 96})
    assert run.images_seen == 96
    starts = (tmp_path / "run" / "starts.jsonl").read_text().splitlines()
    assert [json.loads(line)["images_seen"] for line in starts] == [0, 64]
    with pytest.raises(ValueError, match="other images"):
        train("vae", images[::-1].copy(), tmp_path / "run", **{"train.total_images": 128})


@pytest.mark.slow
def test_own_network_and_objective(images: np.ndarray, tmp_path: Path):
    class Own(torch.nn.Module):
        """Predicts the noise from x alone, without t."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x, t, labels, draws=None):
            return self.layer(x)

    run = train("ddpm", images, tmp_path / "run", network=Own())
    assert isinstance(run.model["net"], Own) and run.images_seen == 64
    assert dgm.load(tmp_path / "run", network=Own()).sample(2, steps=2).shape == (2, 32, 32, 3)


def test_mistakes_are_value_errors(images: np.ndarray, tmp_path: Path):
    with pytest.raises(ValueError, match="is not a run folder"):
        dgm.load(tmp_path)
    with pytest.raises(UserError, match="family is ddmp"):
        dgm.train("ddmp", images, out=tmp_path / "run")
    with pytest.raises(UserError, match=r"images are float64 .*: give uint8"):
        dgm.train("vae", images / 255, out=tmp_path / "run")
    with pytest.raises(UserError, match="labels have shape"):
        dgm.train("vae", images, LABELS[:5], out=tmp_path / "run")
    with pytest.raises(UserError, match=r"optim\.lrr"):
        dgm.train("vae", images, LABELS, out=tmp_path / "run", **{"optim.lrr": 1})
    assert not (tmp_path / "run").exists()


def test_importing_dgm_imports_no_torch(run_script):
    done = run_script("-c", "import sys, dgm; print('torch' in sys.modules)")
    assert done.stdout == "False\n", done.stderr
