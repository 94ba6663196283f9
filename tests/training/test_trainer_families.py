"""Optional protocols of families: data-dependent initialization, visualizations, evaluation."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from small_loop import BOTH, TwoPhases, assert_same, job, left_by, train

from dgm.common.errors import UserError
from dgm.objective import Batch, Nets, Phase
from dgm.rng import Draws
from dgm.training import checkpoint
from dgm.training.engine import Engine
from dgm.training.job import TrainConfig
from dgm.training.sampler import BatchSampler


class ByData(TwoPhases):
    """Initializes a bias by the mean of the images."""

    def initialize(self, nets: Nets, batch: Batch, draws: Draws) -> None:
        self.given = batch.images
        nets["first"].bias.fill_(float(batch.images.double().mean()) / 255)


def test_weights_are_initialized_by_the_first_images_of_the_run(tmp_path: Path):
    objective = ByData(BOTH)
    made = job(tmp_path / "run", objective, lr=1e-30)
    train(made)
    first = made.data.images(BatchSampler(made.data, 3, 8, None, 0, 1)._order(0, 0).numpy())
    assert torch.equal(objective.given, torch.from_numpy(first))
    state, _ = left_by(tmp_path / "run")
    mean = first.astype(float).mean() / 255
    assert state.model["first.bias"].tolist() == pytest.approx([mean] * 12)
    assert state.ema["first.bias"].tolist() == pytest.approx([mean] * 12)


def test_resumed_run_is_not_initialized_again(tmp_path: Path):
    for folder, lengths in (("plain", (96,)), ("resumed", (48, 96))):
        for length in lengths:
            assert train(job(tmp_path / folder, ByData(BOTH), total_images=length))
    assert_same(tmp_path / "plain", tmp_path / "resumed")


def test_a_phase_can_exclude_its_net_from_the_average(tmp_path: Path):
    phases = (Phase("a", "first"), Phase("b", "second", average=False))
    assert train(job(tmp_path / "run", TwoPhases(phases)))
    state, _ = left_by(tmp_path / "run")
    assert {key.split(".")[0] for key in state.ema} == {"first"}
    assert {key.split(".")[0] for key in state.model} == {"first", "second"}


class Showing(TwoPhases):
    """Visualizes stored images."""

    def visualize(self, nets: Nets, batch: Batch, draws: Draws) -> dict[str, torch.Tensor]:
        shown = batch.images[:6].permute(0, 3, 1, 2) / 127.5 - 1
        return {"given": shown.unflatten(0, (2, 3))}


def test_visualizations_are_written_beside_the_samples(tmp_path: Path):
    assert train(job(tmp_path / "run", Showing(BOTH), sample_every_images=48))
    names = sorted(path.name for path in (tmp_path / "run" / "samples").iterdir())
    assert names == [
        f"{seen:09d}{ending}" for seen in (48, 96) for ending in ("-given.png", ".png")
    ]


class WholeOnly(TwoPhases):
    whole_batch = True


def test_micro_batches_are_refused_where_they_change_the_result(tmp_path: Path):
    assert train(job(tmp_path / "whole", WholeOnly(BOTH), micro_batch=8))
    with pytest.raises(UserError, match=r"train\.micro_batch 4 splits the 8 images .*BatchNorm"):
        train(job(tmp_path / "split", WholeOnly(BOTH), micro_batch=4))
    assert not (tmp_path / "split").exists()


def evaluated(values: list[float]) -> dict[str, Any]:
    """Return a job's evaluation, due every 16 images, with these values in turn."""
    left = iter(values)
    return {"evaluation": lambda nets: {"eval/fd_classifier": next(left)}, "eval_every_images": 16}


def test_the_best_checkpoint_is_kept_beside_the_newest(tmp_path: Path):
    made = job(tmp_path / "run", keep_checkpoints=1, save_every_images=0)
    vars(made).update(evaluated([5.0, 3.0, 4.0, math.nan, 3.0, 6.0]))
    with pytest.warns(UserWarning, match="eval/fd_classifier is nan after 64 images"):
        assert train(made)
    saved = sorted(int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert saved == [32, 96]
    state, lines = left_by(tmp_path / "run")
    assert state.state["best"] == {"metric": "eval/fd_classifier", "value": 3.0, "images_seen": 32}
    # Evaluations are logged in a line of their step, besides the logs at multiples of 24.
    found = {line["images_seen"]: line.get("eval/fd_classifier") for line in lines}
    assert list(found) == [16, 24, 32, 48, 72, 80, 96]
    assert found[16] == 5.0 and found[24] is None and found[96] == 6.0
    minima = json.loads((tmp_path / "run" / "minima.json").read_text())
    assert minima["eval/fd_classifier"] == {"value": 3.0, "images_seen": 32, "best": "min"}


def test_resumed_run_keeps_the_best_checkpoint(tmp_path: Path):
    folder = tmp_path / "run"
    for length, values in ((48, [5.0, 1.0, 4.0]), (96, [3.0, 2.0, 6.0])):
        made = job(folder, keep_checkpoints=1, save_every_images=0, total_images=length)
        vars(made).update(evaluated(values))
        assert train(made)
    assert left_by(folder)[0].state["best"]["images_seen"] == 32
    assert sorted(int(p.name) for p in (folder / "checkpoints").iterdir()) == [32, 96]


@pytest.mark.parametrize(
    ("total", "log", "grid"),
    [(48, 16, 16), (60_000, 1_200, 20_000), (102_400_000, 12_800, 1_280_000)],
)
def test_default_cadences_depend_on_the_length(total: int, log: int, grid: int):
    every = TrainConfig(global_batch=16, total_images=total).cadences
    assert every == {"log": log, "samples": grid, "checkpoint": grid}
    chosen = TrainConfig(
        total_images=total, log_every_images=7, sample_every_images=0, save_every_images=9
    )
    assert chosen.cadences == {"log": 7, "samples": 0, "checkpoint": 9}


class Scored(TwoPhases):
    """Has metrics whose best value is the highest, or that have no best value."""

    def loss(self, nets: Nets, batch: Batch, phase: Phase, draws: Draws) -> dict[str, torch.Tensor]:
        found = super().loss(nets, batch, phase, draws)
        return {**found, "elbo": -found["loss"], "logits_fake": found["loss"]}


def test_the_best_value_of_each_metric_follows_its_direction(tmp_path: Path):
    for length in (48, 96):  # the second start continues from the values of the first
        assert train(job(tmp_path / "run", Scored(BOTH), total_images=length))
    _, lines = left_by(tmp_path / "run")
    found = json.loads((tmp_path / "run" / "minima.json").read_text())
    assert set(found) == {f"train/{p}/{n}" for p in "ab" for n in ("loss", "elbo")}
    for name, best in found.items():
        which = max if name.endswith("elbo") else min
        line = which(lines, key=lambda line, name=name: line[name])
        expected = {"value": line[name], "images_seen": line["images_seen"]}
        assert best == {**expected, "best": which.__name__}


class Broken(TwoPhases):
    """Its loss is NaN from a step on; it names the layer with an image of the batch."""

    def __init__(self, from_images: int):
        super().__init__(BOTH)
        self.from_images = from_images

    def loss(self, nets: Nets, batch: Batch, phase: Phase, draws: Draws) -> dict[str, torch.Tensor]:
        found = super().loss(nets, batch, phase, draws)
        broken = phase.name == "b" and batch.images_seen >= self.from_images
        return {**found, "loss": found["loss"] * (math.nan if broken else 1)}

    def find_non_finite(self, nets: Nets, batch: Batch, draws: Draws) -> str | None:
        assert all(p.isfinite().all() for net in nets.values() for p in net.parameters())
        return f"second.layer of image {int(draws.index[0])}"


@pytest.mark.parametrize("on_host", [True, False])
def test_the_layer_that_is_not_finite_is_named_and_weights_stay_finite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_host: bool
):
    monkeypatch.setattr(Engine, "norms_on_host", on_host)
    made = job(tmp_path / "run", Broken(from_images=16), save_every_images=8)
    first = int(BatchSampler(made.data, 3, 8, None, 0, 1)._order(0, 0)[16])
    expected = rf"gradient of b .* step 2 \(after 16 images\).*second\.layer of image {first}:"
    with pytest.raises(UserError, match=expected):
        train(made)
    newest = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert newest is not None and newest.name == "000000016"
    parameters = [p for net in made.engine.copy_nets().values() for p in net.parameters()]
    assert all(p.isfinite().all() for p in parameters)
