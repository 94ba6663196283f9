"""`python launch/benchmark.py likelihood`: a run and a peer trained on the same images."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dgm.benchmarks import likelihood, peer_models
from dgm.cli.parser import open_config
from dgm.cli.train_flow import make_parts
from dgm.common.errors import UserError
from dgm.flow.objective import FlowObjective

LAUNCH = Path(__file__).parents[2] / "launch"


@pytest.fixture(scope="module")
def flow_run(
    run_warm: Callable, tiny_configs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Train the tiny flow and return its run folder."""
    folder = tmp_path_factory.mktemp("runs") / "flow"
    words = ["--config", tiny_configs["flow"], "--run.dir", folder]
    done = run_warm(LAUNCH / "train_flow.py", *words, cwd=folder.parent)
    assert done.code == 0, done.stderr
    return folder


def arguments(run: Path, out: Path, shards: Path, *more: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    likelihood.add_arguments(parser)
    words = [str(run), "--out", str(out), "--test-shards", str(shards), "--num-test", "32", *more]
    return parser.parse_args(words)


@pytest.mark.long
def test_a_peer_that_is_our_own_model_gets_the_same_bits(
    flow_run: Path, tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Equal only if images, order, flips, noise, batch, optimizer and average are those of the run.
    class Ourselves(FlowObjective):
        title = "ourselves"

        def fit_to_data(self, images: object) -> None:
            pass

    def make_peer(*_: object) -> Ourselves:
        config = open_config(flow_run / "config.yaml")
        peer = Ourselves(config.flow, config.sample, (32, 32, 3))
        peer.net = make_parts(config, (32, 32, 3), 10).nets["flow"]
        return peer

    monkeypatch.setattr(likelihood, "_make_peer", make_peer)
    found = likelihood.measure(arguments(flow_run, tmp_path / "peer", tiny_shards))
    assert found["images_seen"] == 256
    bits = found["bits_per_dim"][str(tiny_shards)]
    assert bits["this run"] == bits["ourselves"]
    other = likelihood.measure(
        arguments(flow_run, tmp_path / "faster", tiny_shards, "--lr", "2e-3")
    )["bits_per_dim"][str(tiny_shards)]
    assert other["this run"] == bits["this run"] != other["ourselves"]


def test_probabilities_of_all_grey_levels_sum_to_one() -> None:
    x = (torch.arange(256).double() / 255)[:, None]
    for mean in (0.0, 0.37, 1.0):
        for sigma in (0.004, 0.07, 3.0):
            mass = (-peer_models.level_nll(x, torch.tensor(mean), sigma)).exp()
            assert float(mass.sum()) == pytest.approx(1, abs=1e-9)


@pytest.mark.slow
def test_missing_packages_and_shards_are_named(
    flow_run: Path, tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "normflows", None)
    for options, message in (
        ([], "normflows is not installed.*pip install normflows"),
        (["--test-shards", "nowhere"], "nowhere"),
    ):
        with pytest.raises(UserError, match=message):
            likelihood.measure(arguments(flow_run, tmp_path / "peer", tiny_shards, *options))
        assert not (tmp_path / "peer").exists()
