"""Features of real images are computed once, and again if the file cannot be used."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from array_images import ArrayImages
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dgm.evaluation.distances import FeatureStatistics
from dgm.evaluation.feature_cache import cached_features
from dgm.evaluation.features import FeatureExtractor
from dgm.training.engine import Engine

NUMBERS = np.arange(23)
DATA = ArrayImages(
    np.stack([NUMBERS, NUMBERS**2 % 251, 0 * NUMBERS], 1).astype(np.uint8)[:, None, None]
)
EXPECTED = torch.from_numpy(DATA.pixels).flatten(1).float()


class Counting:
    """A net that counts its images."""

    def __init__(self):
        self.count = 0

    def features(self, version: str = "1") -> FeatureExtractor:
        def forward(images: np.ndarray) -> tuple[Tensor, Tensor]:
            self.count += len(images)
            flat = torch.from_numpy(images).flatten(1).float()
            return flat, flat[:, :2]

        return FeatureExtractor("classifier", version, "none", forward, 5)


def test_a_second_run_computes_none(engine: Engine, tmp_path: Path):
    net = Counting()
    first = cached_features(engine, tmp_path / "new", net.features(), DATA, "id")
    assert net.count == len(DATA)
    again = cached_features(engine, tmp_path / "new", net.features(), DATA, "id")
    assert net.count == len(DATA)
    for found in (first, again):
        assert torch.equal(found.features, EXPECTED)
        statistics = FeatureStatistics.from_features(EXPECTED)
        np.testing.assert_array_equal(found.statistics.mean, statistics.mean)
        np.testing.assert_array_equal(found.statistics.covariance, statistics.covariance)
    cached_features(engine, tmp_path / "new", net.features(), DATA, "other")
    assert net.count == 2 * len(DATA)


def test_a_file_of_another_version_is_named_and_replaced(engine: Engine, tmp_path: Path):
    net = Counting()
    cached_features(engine, tmp_path, net.features("1"), DATA, "id")
    with pytest.warns(
        UserWarning, match=r"id.safetensors is computed again: its version is '1', not"
    ):
        cached_features(engine, tmp_path, net.features("2"), DATA, "id")
    assert net.count == 2 * len(DATA)
    cached_features(engine, tmp_path, net.features("2"), DATA, "id")
    assert net.count == 2 * len(DATA)


@pytest.mark.parametrize("harm", ["cut", "empty", "no_covariance", "other_count", "no_header"])
def test_a_damaged_file_is_named_and_replaced(engine: Engine, tmp_path: Path, harm: str):
    net = Counting()
    cached_features(engine, tmp_path, net.features(), DATA, "id")
    (path,) = tmp_path.iterdir()
    with safe_open(path, "pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    if harm in ("cut", "empty"):
        path.write_bytes(path.read_bytes()[:200] if harm == "cut" else b"")
    elif harm == "no_covariance":
        save_file({"features": tensors["features"]}, path, header)
    elif harm == "other_count":
        save_file({**tensors, "features": tensors["features"][:5].clone()}, path, header)
    else:
        save_file(tensors, path)
    with pytest.warns(UserWarning, match="id.safetensors is computed again"):
        found = cached_features(engine, tmp_path, net.features(), DATA, "id")
    assert net.count == 2 * len(DATA) and torch.equal(found.features, EXPECTED)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_folder_that_cannot_be_written_is_named(engine: Engine, tmp_path: Path):
    net = Counting()
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(UserWarning, match="cannot be written, so features are computed each time"):
        found = cached_features(engine, tmp_path / "file" / "x", net.features(), DATA, "id")
    assert len(found.features) == 23
