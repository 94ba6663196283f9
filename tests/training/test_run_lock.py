"""One process at a time trains a run folder, however the previous one ended."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dgm.common.errors import UserError
from dgm.training.run_lock import LOCK, WAIT, RunLock

ROOT = Path(__file__).parents[2]
HOLD = """
import sys, time
from pathlib import Path
from dgm.training.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]))
lock.take()
print("held", flush=True)
sys.stdin.readline()
lock.release()
print("free", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def hold(tmp_path: Path) -> Iterator[Callable[[], subprocess.Popen]]:
    """Return a starter of a process that holds the lock of `tmp_path` until it reads a line."""
    started: list[subprocess.Popen] = []

    def start() -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(tmp_path)],
            cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        started.append(process)
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_second_process_is_refused_with_the_owner_of_the_lock(hold: Callable, tmp_path: Path):
    first = hold()
    owner = f"process {first.pid} on {socket.gethostname()}"
    message = f"run.dir {tmp_path} is being trained by {owner}: "
    with pytest.raises(UserError, match=message):
        RunLock(tmp_path).take()
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == first.pid


def test_the_lock_of_a_killed_process_is_free(hold: Callable, tmp_path: Path):
    first = hold()
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert (tmp_path / LOCK).exists()
    lock = RunLock(tmp_path)
    lock.take()
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    lock.release()
    assert not list(tmp_path.iterdir())


def test_a_waiting_process_takes_the_lock_when_its_owner_ends(
    hold: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    first = hold()
    monkeypatch.setenv(WAIT, "0.3")
    began = time.monotonic()
    with pytest.raises(UserError, match="wait until it ends, stop it, or choose another"):
        RunLock(tmp_path).take()
    assert time.monotonic() - began >= 0.3
    monkeypatch.setenv(WAIT, "60")
    print(file=first.stdin, flush=True)
    lock = RunLock(tmp_path)
    lock.take()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == (
        f"waiting up to 0.3 s for process {first.pid} on {socket.gethostname()}, "
        f"which trains {tmp_path}"
    )
    # The first may have removed the file that this process opened; a third has to see the new one.
    with pytest.raises(UserError, match=f"process {os.getpid()} on"):
        monkeypatch.setenv(WAIT, "0")
        RunLock(tmp_path).take()
    lock.release()


def test_a_lock_without_a_readable_owner_holds_too(hold: Callable, tmp_path: Path):
    hold()
    for text in ("", "[", "[1]", "{}", "[" * 100_000):
        (tmp_path / LOCK).write_text(text)
        with pytest.raises(UserError, match="is being trained by another process: wait"):
            RunLock(tmp_path).take()


def test_a_wait_that_is_not_a_number_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(WAIT, "long")
    with pytest.raises(UserError, match=f"{WAIT} is 'long': give seconds"):
        RunLock(tmp_path).take()
