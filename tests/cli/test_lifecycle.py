"""A run stops on request at any moment, and never hangs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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
    """Return a function that starts an endless run, which is killed at the end of the test."""
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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_request_to_stop_before_the_first_step_is_answered_immediately(
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


def test_a_run_whose_shards_hang_ends_after_its_timeout(start: Callable, tmp_path: Path) -> None:
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
    log, end = folder / "metrics.jsonl", time.monotonic() + 150
    while not (log.exists() and log.read_bytes().count(b"\n") >= 2):
        assert time.monotonic() < end, "no two steps were logged"
        time.sleep(0.05)
    for _ in range(20):  # most of the time of such a run is spent on saving
        process.send_signal(signal.SIGTERM)
        time.sleep(0.01)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (75, "")
    assert "stopped and saved: run the same command to continue" in out.splitlines()
    saved = [path.name for path in (folder / "checkpoints").iterdir()]
    assert all(name.isdigit() for name in saved)
    assert all(checkpoint.find_fault(folder / "checkpoints" / name) is None for name in saved)
    last = json.loads(log.read_text().splitlines()[-1])
    assert int(max(saved)) == last["images_seen"]
