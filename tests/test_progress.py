"""Progress of long work, by the first process alone; tests/shards has tests of the bar."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from terminal import Terminal

ROOT = Path(__file__).resolve().parents[1]
WORK = """
import time
from dgm.common.progress import advance, progress
with progress("making images", 10):
    for _ in range(10):
        time.sleep(PAUSE)
        advance(1.25)
"""


def work(pause_s: float, **variables: str) -> tuple[str, str]:
    """Return standard output and errors of ten steps."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    command = [sys.executable, "-c", WORK.replace("PAUSE", str(pause_s))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return done.stdout, done.stderr


@pytest.mark.slow
def test_short_work_is_silent_and_long_work_has_two_lines() -> None:
    assert work(0) == ("", "")
    assert work(0.23) == ("", "making images ...\nmaking images took 2.3 s\n")
    assert work(0.21, RANK="1", WORLD_SIZE="2") == ("", "")


@pytest.mark.slow
def test_sampling_shows_a_bar_on_a_terminal(
    tiny_run: Callable[[str], Path], user_environment: dict[str, str], tmp_path: Path
) -> None:
    words = [sys.executable, str(ROOT / "launch" / "sample.py"), str(tiny_run("diffusion"))]
    words += ["--per_class", "8", "--sampler", "ddpm", "--steps", "100", "--out"]
    terminal = Terminal([*words, str(tmp_path / "x.png")], user_environment, ROOT, columns=80)
    try:
        assert terminal.wait() == 0, terminal.text
    finally:
        terminal.close()
    assert "sampling: " in terminal.text, terminal.text
    assert (tmp_path / "x.png").exists() and (tmp_path / "x.npz").exists()
