"""The state of a run, from Slurm and from its own history."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from written_runs import write_checkpoint

from slurm import status
from slurm.run_state import RunState
from slurm.slurm_cli import State

ROOT = Path(__file__).resolve().parents[2]
START = {"event": "start", "submission": "now", "restart": 0, "processes": 2}
STOPPED = {"event": "end", "submission": "now", "verdict": "stopped"}
FAULT = {"event": "end", "submission": "now", "verdict": "fault"}
DONE = {"event": "end", "submission": "now", "verdict": "done"}


def make(run: Path, history: list[dict], job: dict | None = None) -> RunState:
    state = RunState(run)
    state.folder.mkdir(parents=True)
    job = {"cluster": "slurm", "job": "7"} if job is None else job
    state.write_job({**job, "submission": "now"})
    lines = "".join(json.dumps(line) + "\n" for line in history)
    (state.folder / "history.jsonl").write_text(lines)
    return state


@pytest.mark.parametrize(
    ("slurm", "history", "expected"),
    [
        (State("PENDING", "Resources"), [], "queued"),
        (State("PENDING", "BeginTime"), [START, STOPPED], "requeued"),
        (State("PENDING", "JobHeldAdmin"), [START, FAULT], "held"),
        (State("PENDING", "launch failed requeued held"), [START], "held"),
        (State("RUNNING"), [START], "running"),
        (State("RUNNING"), [START, FAULT, START], "running"),
        (State("COMPLETING"), [START, DONE], "done"),
        (State("COMPLETED"), [START, DONE], "done"),
        (State("FAILED"), [START, FAULT], "failed"),
        (State("TIMEOUT"), [START], "timed out"),
        (State("OUT_OF_MEMORY"), [START], "out of memory"),
        (State("CANCELLED"), [], "cancelled"),
        (State("NODE_FAIL"), [START], "failed"),
        (None, [START, DONE], "done"),  # no longer known to Slurm, without accounting
        (None, [START, FAULT], "failed"),
        (None, [START, STOPPED], "stopped"),
        (None, [START], "lost"),
    ],
)
def test_states(tmp_path: Path, slurm: State | None, history: list[dict], expected: str) -> None:
    state = make(tmp_path / "run", history)
    assert status.state_of(state, state.job(), slurm) == expected


def test_only_the_last_submission_counts(tmp_path: Path) -> None:
    before = [{**line, "submission": "before"} for line in (START, FAULT, START, DONE)]
    state = make(tmp_path / "run", before[:2])
    assert status.state_of(state, state.job(), State("PENDING")) == "queued"
    assert status.state_of(state, state.job(), None) == "cancelled"
    longer = make(tmp_path / "longer", before)
    assert status.state_of(longer, longer.job(), State("PENDING")) == "queued"


def test_a_local_run_is_running_as_long_as_its_process(tmp_path: Path) -> None:
    job = {"cluster": "local", "job": "local-1", "pid": os.getpid()}
    state = make(tmp_path / "run", [START], job)
    assert status.state_of(state, state.job(), None) == "running"
    dead = make(tmp_path / "dead", [START], {**job, "pid": 2**22 - 1})
    assert status.state_of(dead, dead.job(), None) == "lost"


def test_a_row_has_progress_speed_and_last_error(tmp_path: Path) -> None:
    history = [START, {**STOPPED}, {**START, "restart": 1}, FAULT]
    state = make(tmp_path / "run", history)
    (state.path / "config.yaml").write_text("train:\n  total_images: 1000\n")
    lines = [
        {"step": n, "images_seen": 100 * n, "time/images_per_s": 50, "train/loss": 1 / n}
        for n in (1, 2)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (state.path / "metrics.jsonl").write_text(text + '{"torn')
    state.log.write_text(
        "fine\nTraceback (most recent call last):\n  File x\nRuntimeError: [gone] away\nmore\n"
    )
    write_checkpoint(state.path, 300)
    row = status._row(state, state.job(), State("FAILED"))
    assert (row.state, row.images_seen, row.total_images) == ("failed", 300, 1000)
    assert (row.images_per_s, row.loss, row.left_s) == (50, 0.5, 14)
    assert (row.requeues, row.processes) == (1, 2)
    assert row.error == "RuntimeError: [gone] away"
    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(status.table([row], tmp_path))
    shown = console.export_text()
    assert "RuntimeError: [gone] away" in shown and "14.0 s" in shown and "│ run" in shown


def test_runs_that_were_not_submitted_have_a_row(tmp_path: Path) -> None:
    run = tmp_path / "mine"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "images_seen": 5, "train/vae/loss": 2.0}\n')
    (found,) = status.find_runs(tmp_path)
    row = status._row(found, found.job(), None)
    assert (row.state, row.images_seen, row.loss) == ("by hand", 5, 2.0)


def test_watching_ends_with_the_last_run(tmp_path: Path, monkeypatch, capsys) -> None:
    make(tmp_path / "run", [START, DONE], {"cluster": "local", "job": "local-1", "pid": 2**22 - 1})
    monkeypatch.setattr("sys.argv", ["status", str(tmp_path), "--watch"])
    assert status.main() == 0
    assert "done" in capsys.readouterr().out


def test_a_full_disk_is_a_one_line_error(tmp_path: Path) -> None:
    make(tmp_path / "run", [START, DONE], {"cluster": "local", "job": "local-1", "pid": 2**22 - 1})
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "slurm.status", str(tmp_path)],
            cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60,
        )  # fmt: skip
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("error: standard output: No space left on device: free space there")
