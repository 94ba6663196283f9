"""Inception's features from a local file, against torch-fidelity from image to metric."""

from __future__ import annotations

import hashlib
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from random_inception import write_random_weights
from torch.utils.data import Dataset

from dgm.common.errors import UserError
from dgm.evaluation import inception
from dgm.evaluation.distances import class_score, squared_mmd
from dgm.evaluation.inception import SHA256, SIZE, URL, inception_features
from dgm.evaluation.prdc import prdc
from dgm.training.engine import Engine
from shards import shapes

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("nothing may be downloaded")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)


class Pictures(Dataset):
    """Shapes as torch-fidelity takes a data set."""

    def __init__(self, first: int, count: int):
        self.pixels = np.stack([shapes.render("train", first + k) for k in range(count)])

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, k: int) -> torch.Tensor:
        return torch.from_numpy(self.pixels[k]).permute(2, 0, 1)


@pytest.mark.slow
def test_metrics_of_images_are_torch_fidelitys(engine: Engine, tmp_path: Path):
    from torch_fidelity import calculate_metrics

    weights = write_random_weights(tmp_path / "weights.pth")
    sets = Pictures(0, 8), Pictures(5, 8)
    theirs = calculate_metrics(
        input1=sets[0], input2=sets[1], feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(weights), kid=True, isc=True, prc=True,
        kid_subsets=1, kid_subset_size=8, isc_splits=2, samples_shuffle=False, cuda=False,
        cache=False, save_cpu_ram=True, verbose=False,
    )  # fmt: skip
    features = inception_features(weights, CPU)
    assert features.name == "inception-" + hashlib.sha256(weights.read_bytes()).hexdigest()[:8]
    (generated, logits), (real, _) = (
        features.compute(engine, len(part), part.pixels.__getitem__) for part in sets
    )
    assert generated.shape == (8, 2048) and logits.shape == (8, 1008)
    found = {
        "kernel_inception_distance_mean": squared_mmd(generated, real),
        "inception_score_mean": class_score(logits, splits=2),
        **{k: v for k, v in prdc(generated, real).items() if k in ("precision", "recall")},
    }
    # torch-fidelity takes differences of kernel values of about 1 in float32.
    assert found == {name: pytest.approx(theirs[name], rel=1e-6, abs=1e-6) for name in found}


@pytest.mark.slow
def test_the_standard_weights_are_named_inception(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    weights = write_random_weights(tmp_path / "weights.pth")
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    monkeypatch.setattr(inception, "SHA256", digest)
    features = inception_features(weights, CPU)
    assert (features.name, features.version) == ("inception", digest[:12])
    assert "299" in features.resizer


def test_a_missing_file_says_where_to_get_it(tmp_path: Path):
    with pytest.raises(UserError) as caught:
        inception_features(tmp_path / "none.pth", CPU)
    message = str(caught.value)
    for part in (
        f"{tmp_path}/none.pth",
        URL,
        SHA256,
        f"{SIZE:,}",
        "--weights",
        "--features classifier",
    ):
        assert part in message
    assert "\n" not in message and SHA256.startswith(URL[-12:-4])


def test_a_wrong_or_damaged_file_is_named(tmp_path: Path):
    path = tmp_path / "weights.pth"
    contents: dict[str, object] = {
        "does not hold tensors": {"epoch": 3},
        "not those of the net": {"fc.weight": torch.zeros(3)},
    }
    for message, content in contents.items():
        torch.save(content, path)
        with pytest.raises(
            UserError, match=rf"weights.pth is damaged or of another net.*{message}"
        ):
            inception_features(path, CPU)
    torch.save({"fc.weight": torch.zeros(3000)}, path)
    for damaged in (path.read_bytes()[:500], b"", b"\x00" * 100):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=rf"cannot be read.*{len(damaged)} bytes.*{URL}"):
            inception_features(path, CPU)
