"""A process that hangs is ended with a line that names its activity; a busy one is not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIMIT_S = 0.6
UNTIL_END = "while time.monotonic() < end: 1"
WATCHED = """
import mmap, os, signal, sys, threading, time
from dgm.training.watchdog import Watchdog
watchdog = Watchdog(float(sys.argv[1]) / 60)
watchdog.start()
exec(sys.argv[2])
watchdog.close()
print("done")
"""


def watch(work: str, limit_s: float = LIMIT_S) -> tuple[int, str, float]:
    """Run work beside a watchdog; return exit code, standard error and seconds."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, str(limit_s), work],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    return done.returncode, done.stderr, time.monotonic() - began


def test_hanging_data_end_the_process_with_its_stack(tmp_path: Path):
    os.mkfifo(tmp_path / "data")
    code, message, took_s = watch(
        f"watchdog.set_activity('data'); open({str(tmp_path / 'data')!r})"
    )
    assert code == 1
    first, *stacks = message.splitlines()
    assert first.startswith("error: nothing was done for 0.01 minutes (train.timeout_minutes) wh")
    assert "while waiting for data: look at the disk or network that data.shards lies on" in first
    assert any('File "<string>", line 1 in <module>' in line for line in stacks)
    assert took_s < LIMIT_S + 10


def test_a_process_that_holds_the_gil_is_ended_too():
    # Like a page fault of a mapped file: no other Python thread can run.
    code, message, _ = watch("import ctypes; watchdog.set_activity('data'); time.sleep(0.2); "
                          "ctypes.PyDLL(None).sleep(30)")  # fmt: skip
    assert code == 1
    assert "Timeout (" in message and "line 1 in <module>" in message


@pytest.mark.slow
def test_steps_long_work_and_runs_without_a_limit_are_not_ended():
    steps = "[(watchdog.set_activity('step'), time.sleep(0.05)) for _ in range(30)]"
    work = "watchdog.set_activity('eval'); end = time.monotonic() + 1.5\n" + UNTIL_END
    assert watch(steps)[:2] == watch(work)[:2] == (0, "")
    assert watch("watchdog.set_activity('step'); time.sleep(1)", limit_s=0)[:2] == (0, "")
    assert watch("time.sleep(1)")[:2] == (0, "")  # before the first activity


def test_an_endless_step_is_ended():
    work = (
        "end = time.monotonic() + 9; watchdog.set_activity('step')\nwhile time.monotonic() < end: 1"
    )
    code, message, _ = watch(work)
    assert code == 1 and "while in a step: look at the other processes" in message


def test_the_time_during_which_a_process_is_stopped_does_not_count():
    process = subprocess.Popen(
        [sys.executable, "-c", WATCHED, str(LIMIT_S),
         "watchdog.set_activity('step'); print('on', flush=True); time.sleep(0.5)"],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "on\n"
    process.send_signal(signal.SIGTSTP)
    time.sleep(2 * LIMIT_S)
    process.send_signal(signal.SIGCONT)
    assert process.communicate(timeout=30) == ("done\n", "")
    assert process.returncode == 0
