"""Progress of long work, of the first process: a bar on a terminal, otherwise lines."""

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


def run(code: str, **variables: str) -> tuple[str, str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    return done.stdout, done.stderr


def on_terminal(words: list[str], environment: dict[str, str]) -> tuple[str, int]:
    """Run a command in a terminal; return its output and exit code."""
    terminal = Terminal(words, environment, ROOT, columns=80)
    try:
        code = terminal.wait()
        return terminal.text, code
    finally:
        terminal.close()


@pytest.mark.slow
def test_short_work_is_silent_and_long_work_has_two_lines() -> None:
    assert run(WORK.replace("PAUSE", "0")) == ("", "")
    output = run(WORK.replace("PAUSE", "0.23"))
    assert output == ("", "making images ...\nmaking images took 2.3 s\n")
    assert run(WORK.replace("PAUSE", "0.21"), RANK="1", WORLD_SIZE="2") == ("", "")


def test_failed_work_prints_no_line_after_its_error() -> None:
    code = WORK.replace("PAUSE", "0") + "    1 / 0\n"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert done.stderr.startswith("Traceback")
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n")


def test_a_terminal_shows_a_labeled_bar() -> None:
    code = WORK.replace("PAUSE", "0.15")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    output, done = on_terminal([sys.executable, "-c", code], environment)
    assert done == 0
    assert "making images:  75% |" in output or "making images:  88% |" in output, output
    assert "13/10" not in output


@pytest.mark.slow
def test_sampling_shows_a_bar_on_a_terminal(
    tiny_run: Callable[[str], Path], user_environment: dict[str, str], tmp_path: Path
) -> None:
    words = [sys.executable, str(ROOT / "launch" / "sample.py"), str(tiny_run("diffusion"))]
    words += ["--per_class", "8", "--sampler", "ddpm", "--steps", "100", "--out"]
    output, done = on_terminal([*words, str(tmp_path / "x.png")], user_environment)
    assert done == 0, output
    assert "sampling: " in output, output
    assert (tmp_path / "x.png").exists() and (tmp_path / "x.npz").exists()
