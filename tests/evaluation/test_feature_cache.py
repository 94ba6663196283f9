"""Features of real images are found once, and made again where the file is no good."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dgm.evaluation.feature_cache import describe_real
from dgm.evaluation.features import Features
from dgm.evaluation.frechet import Moments
from dgm.training.engine import Engine


class Numbers:
    """Images of one pixel whose grey level is their number."""

    def __len__(self) -> int:
        return 23

    def images(self, index: np.ndarray) -> np.ndarray:
        return np.stack([index, index**2 % 251, 0 * index], 1).astype(np.uint8)[:, None, None]

    def labels(self, index: np.ndarray) -> np.ndarray:
        return index % 2


class Counting:
    """A net that counts the images it is shown."""

    def __init__(self):
        self.seen = 0

    def features(self, version: str = "1") -> Features:
        def see(images: np.ndarray) -> tuple[Tensor, Tensor]:
            self.seen += len(images)
            flat = torch.from_numpy(images).flatten(1).float()
            return flat, flat[:, :2]

        return Features("cifar", version, "none", see, 5)


def test_a_second_run_computes_none(engine: Engine, tmp_path: Path):
    net, data = Counting(), Numbers()
    first = describe_real(engine, tmp_path / "new", net.features(), data, "id")
    assert net.seen == len(data)
    again = describe_real(engine, tmp_path / "new", net.features(), data, "id")
    assert net.seen == len(data)
    expected = torch.from_numpy(data.images(np.arange(23))).flatten(1).float()
    for found in (first, again):
        assert torch.equal(found.features, expected)
        moments = Moments.of(expected)
        np.testing.assert_array_equal(found.moments.mean, moments.mean)
        np.testing.assert_array_equal(found.moments.covariance, moments.covariance)
    describe_real(engine, tmp_path / "new", net.features(), data, "other")
    assert net.seen == 2 * len(data)


def test_a_file_of_another_version_is_named_and_made_again(engine: Engine, tmp_path: Path):
    net, data = Counting(), Numbers()
    describe_real(engine, tmp_path, net.features("1"), data, "id")
    with pytest.warns(UserWarning, match=r"id.safetensors is made again: its version is '1', not"):
        describe_real(engine, tmp_path, net.features("2"), data, "id")
    assert net.seen == 2 * len(data)
    describe_real(engine, tmp_path, net.features("2"), data, "id")
    assert net.seen == 2 * len(data)


@pytest.mark.parametrize("harm", ["cut", "empty", "without_moments", "other_count", "no_header"])
def test_a_damaged_file_is_named_and_made_again(engine: Engine, tmp_path: Path, harm: str):
    net, data = Counting(), Numbers()
    expected = describe_real(engine, tmp_path, net.features(), data, "id")
    (path,) = tmp_path.iterdir()
    with safe_open(path, "pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    if harm in ("cut", "empty"):
        path.write_bytes(path.read_bytes()[:200] if harm == "cut" else b"")
    elif harm == "without_moments":
        save_file({"features": tensors["features"]}, path, header)
    elif harm == "other_count":
        save_file({**tensors, "features": tensors["features"][:5].clone()}, path, header)
    else:
        save_file(tensors, path)
    with pytest.warns(UserWarning, match="id.safetensors is made again"):
        found = describe_real(engine, tmp_path, net.features(), data, "id")
    assert net.seen == 2 * len(data) and torch.equal(found.features, expected.features)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_folder_that_cannot_be_written_is_told(engine: Engine, tmp_path: Path):
    net = Counting()
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(UserWarning, match="cannot be written and is made each time"):
        found = describe_real(engine, tmp_path / "file" / "x", net.features(), Numbers(), "id")
    assert len(found.features) == 23
