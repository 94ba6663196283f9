"""A run is trained by one process at a time, stops when asked at any moment, and never hangs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from processes import kill_all
from tiny import LAUNCH

from dgm.training import checkpoint
from dgm.training.run_lock import LOCK, WAIT, RunLock

SCRIPT = LAUNCH / "train_vae.py"
STOPPED = "stopped before its first step: run the same command to continue"

pytestmark = pytest.mark.slow


@pytest.fixture
def start(
    start_script: Callable, tiny_configs: dict[str, Path], tmp_path: Path
) -> Iterator[Callable[..., subprocess.Popen]]:
    """Return a starter of a run that trains for ever; none of its processes outlives the test."""
    started: list[subprocess.Popen] = []

    def go(*options: object, **how: Any) -> subprocess.Popen:
        words = [SCRIPT, "--config", tiny_configs["vae"], "--run.dir", tmp_path / "run"]
        words += ["--run.trackers=[]", f"--train.total_images={10**9}", *options]
        started.append(start_script(*words, **how))
        return started[-1]

    yield go
    for process in started:
        if process.poll() is None:
            kill_all(process)
        process.communicate()


def until(happened: Callable[[], bool], what: str, timeout_s: float = 150) -> None:
    end = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < end, what
        time.sleep(0.05)


def begun(folder: Path) -> bool:
    path = folder / "metrics.jsonl"
    return path.exists() and len(path.read_bytes().splitlines()) >= 2


def test_a_run_folder_in_use_is_refused_and_one_whose_process_was_killed_is_not(
    start: Callable, run_warm: Callable, tiny_configs: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    first = start()
    until(lambda: begun(folder), "it did not begin")
    words = [SCRIPT, "--config", tiny_configs["vae"], "--run.dir", folder, "--run.trackers=[]"]
    words += [f"--train.total_images={10**9}"]
    for processes in (1, 2):
        before = (folder / "starts.jsonl").read_bytes()
        second = run_warm(*words, processes=processes)
        assert second.code == 2
        (line,) = second.stderr.splitlines()
        message = f"error: run.dir {folder} is being trained by process {first.pid} on "
        assert line.startswith(message), line
        assert (folder / "starts.jsonl").read_bytes() == before
    first.kill()
    first.wait()
    assert (folder / LOCK).exists()
    words[-1] = f"--train.total_images={16 * 1}"
    again = run_warm(*words)
    assert again.code == 0, again.stderr
    assert not (folder / LOCK).exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_run_that_is_asked_to_stop_before_its_first_step_stops_immediately(
    start: Callable, tmp_path: Path, number: signal.Signals
) -> None:
    (tmp_path / "run").mkdir()
    held = RunLock(tmp_path / "run")
    held.take()
    process = start(variables={WAIT: "600"})
    message = process.stderr.readline()  # the job is prepared, the folder untouched
    assert message.startswith(f"waiting up to 600 s for process {os.getpid()} on "), message
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out.splitlines()[-1], err) == (75, STOPPED, "")
    assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK]
    held.release()


def test_a_run_whose_shards_hang_ends_after_the_time_that_was_set(
    start: Callable, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "never.tar")
    process = start("--data.shards", tmp_path / "never.tar", "--train.timeout_minutes=0.05")
    _, err = process.communicate(timeout=90)
    assert process.returncode == 1
    assert err.startswith("error: nothing was done for 0.05 minutes (train.timeout_minutes) while")
    assert "while opening or building shards: look at the disk" in err.splitlines()[0]
    assert "in ensure" in err, "no stacks were printed"


def test_a_save_is_completed_however_many_signals_arrive(start: Callable, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start("--train.save_every_images=16")
    until(lambda: begun(folder), "it did not begin")
    for _ in range(20):  # most of the time of such a run is spent on saving
        process.send_signal(signal.SIGTERM)
        time.sleep(0.01)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (75, "")
    assert "stopped and saved: run the same command to continue" in out.splitlines()
    saved = [path.name for path in (folder / "checkpoints").iterdir()]
    assert all(name.isdigit() for name in saved)
    assert all(checkpoint.find_fault(folder / "checkpoints" / name) is None for name in saved)
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert int(max(saved)) == last["images_seen"]


@pytest.mark.long  # the launcher gives a stopped process half a minute
def test_a_process_whose_neighbour_hangs_ends_after_the_time_that_was_set(
    start: Callable, tmp_path: Path
) -> None:
    launcher = start("--train.timeout_minutes=0.1", processes=2)
    until(lambda: begun(tmp_path / "run"), "it did not begin")
    ranks = {p.environ().get("RANK"): p for p in psutil.Process(launcher.pid).children(True)}
    ranks["1"].suspend()
    began = time.monotonic()
    until(lambda: not ranks["0"].is_running(), "it waits still", 30)
    took_s = time.monotonic() - began
    _, err = launcher.communicate(timeout=90)
    print(f"ended {took_s:.1f} s after its neighbour was stopped")
    assert launcher.returncode != 0
    (error,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "0.1 minutes (train.timeout_minutes) while in a step" in error
    assert not any(rank.is_running() for rank in ranks.values())
