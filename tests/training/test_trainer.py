"""The trainer, with an objective of two phases that trains in milliseconds."""

from __future__ import annotations

import itertools
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from small_loop import Folder, TwoPhases, assert_same, job, left_by, train

from dgm.common.errors import UserError
from dgm.objective import Phase
from dgm.training.stop_request import StopRequest
from dgm.training.trainer import Trainer


@pytest.fixture
def uninterrupted(tmp_path: Path) -> Path:
    """Return the folder of an uninterrupted run."""
    assert train(job(tmp_path / "uninterrupted"))
    return tmp_path / "uninterrupted"


def test_a_run_writes_log_checkpoints_and_a_grid(uninterrupted: Path):
    state, lines = left_by(uninterrupted)
    assert [line["images_seen"] for line in lines] == [24, 48, 72, 96]
    assert [line["step"] for line in lines] == [3, 6, 9, 12]
    assert set(lines[0]) == {
        *("step", "images_seen"),
        *(f"train/{phase}/{n}" for phase in "ab" for n in ("loss", "labels", "grad_norm", "lr")),
    }
    assert sorted(p.name for p in (uninterrupted / "checkpoints").iterdir()) == [
        *("000000032", "000000064", "000000096")
    ]
    assert [p.name for p in (uninterrupted / "samples").iterdir()] == ["000000096.png"]
    assert state.state["images_seen"] == 96 and state.state["step"] == 12
    # Each phase counts its own updates.
    assert float(state.optimizer["first.step.weight"]) == 12
    assert float(state.optimizer["second.step.weight"]) == 6


@pytest.mark.parametrize("interrupted_at", [8, 32, 40, 88])
def test_resumed_run_equals_uninterrupted_run(
    tmp_path: Path, uninterrupted: Path, interrupted_at: int
):
    folder = tmp_path / "stopped"
    stopping = job(folder)
    steps = itertools.count(1)
    stopping.engine.any_rank = lambda _: 8 * next(steps) == interrupted_at  # type: ignore[method-assign]
    assert not train(stopping)
    assert left_by(folder)[0].state["images_seen"] == interrupted_at
    for _ in range(2):  # the second time the run is finished
        assert train(job(folder))
        assert_same(folder, uninterrupted)


def test_a_run_with_a_damaged_newest_checkpoint_catches_up(tmp_path: Path, uninterrupted: Path):
    folder = tmp_path / "damaged"
    train(job(folder))
    (folder / "checkpoints" / "000000096" / "model.safetensors").write_bytes(b"torn")
    with pytest.warns(UserWarning, match="000000096 is skipped"):
        assert train(job(folder))
    assert_same(folder, uninterrupted)


def test_a_finished_run_can_be_made_longer(tmp_path: Path, uninterrupted: Path):
    folder = tmp_path / "longer"
    assert train(job(folder, total_images=48))
    assert train(job(folder))
    assert_same(folder, uninterrupted)


def test_micro_batches_train_the_same(tmp_path: Path, uninterrupted: Path):
    folder = tmp_path / "micro"
    assert train(job(folder, micro_batch=2))
    (first, log), (second, other_log) = left_by(folder), left_by(uninterrupted)
    for key, value in second.model.items():
        # Sums in another order round differently; Adam at a rate of 0.01 turns that into 1e-5.
        torch.testing.assert_close(first.model[key], value, rtol=0, atol=1e-5)
    for line, other in zip(log, other_log, strict=True):
        assert line == pytest.approx(other, rel=1e-4)


def test_a_single_phase_is_not_named_in_the_log(tmp_path: Path):
    assert train(job(tmp_path / "one", TwoPhases((Phase("only", "first"),))))
    _, lines = left_by(tmp_path / "one")
    expected = {"train/loss", "train/labels", "train/grad_norm", "train/lr"}
    assert set(lines[0]) == {"step", "images_seen", *expected}


def test_a_run_is_not_resumed_with_other_images(tmp_path: Path):
    folder = tmp_path / "run"
    train(job(folder, total_images=32))
    other = job(folder)
    other.data_id = "another"
    with pytest.raises(UserError, match=r"other images .*noise, now another"):
        train(other)


def test_cadences_count_images_not_steps(tmp_path: Path):
    folder = tmp_path / "run"
    train(job(folder, global_batch=10, total_images=95, sample_every_images=25))
    # Multiples of 25 and of 32 are crossed in these steps; the run ends with a whole one.
    grids = sorted(int(p.stem) for p in (folder / "samples").iterdir())
    saved = sorted(int(p.name) for p in (folder / "checkpoints").iterdir())
    assert grids == [30, 50, 80, 100]
    assert saved == [40, 70, 100]
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["images_seen"] for line in lines] == [30, 50, 80, 100]


def test_a_request_after_the_first_step_saves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ended: list[str] = []
    stop = StopRequest(exit_now=lambda: ended.append("exited"))
    log = Trainer.log

    def log_and_stop(trainer: Trainer) -> None:  # the step is logged, but not yet saved
        log(trainer)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Trainer, "log", log_and_stop)
    made = job(tmp_path / "run", log_every_images=8, save_every_images=0)
    try:
        assert not Trainer(made).train(Folder(made.folder), stop)
    finally:
        stop.close()
    assert ended == []
    state, lines = left_by(tmp_path / "run")
    assert state.state["images_seen"] == lines[-1]["images_seen"] == 8
