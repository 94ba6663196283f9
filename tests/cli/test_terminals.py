"""Ctrl-C and a closed terminal save and stop a run on one and two processes; nohup protects it."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from terminal import Terminal, ignores
from tiny import LAUNCH

from dgm.training import checkpoint

ROOT = LAUNCH.parent
ACCELERATE = ["--config_file", ROOT / "accelerate_config.yaml"]
TWO = [*ACCELERATE, "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
BARE = [sys.executable, "-m", "accelerate.commands.launch"]
OURS = [sys.executable, LAUNCH / "run_accelerate.py"]
SAVED = "stopped and saved: run the same command to continue"

pytestmark = pytest.mark.slow


@pytest.fixture
def start(
    tiny_configs: dict[str, Path], user_environment: dict[str, str], tmp_path: Path
) -> Iterator[Callable[..., Terminal]]:
    """Return a function that starts an endless run in a terminal, and waits for its first steps."""
    started: list[Terminal] = []

    def go(*launcher: object) -> Terminal:
        words = [*launcher, LAUNCH / "train_vae.py", "--config", tiny_configs["vae"]]
        words += ["--run.dir", tmp_path / "run", "--run.trackers=[]"]
        words += [f"--train.total_images={10**9}", f"--train.save_every_images={10**9}"]
        started.append(Terminal(words, user_environment, tmp_path))
        started[-1].until(lambda: num_logged(tmp_path / "run") >= 2)
        return started[-1]

    yield go
    for terminal in started:
        terminal.close()


def num_logged(run: Path) -> int:
    log = run / "metrics.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def assert_saved(run: Path) -> None:
    (saved,) = (run / "checkpoints").iterdir()
    assert checkpoint.find_fault(saved) is None
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert int(saved.name) == last["images_seen"]
    assert not (run / ".lock").exists()


@pytest.mark.parametrize(
    "launcher",
    [[sys.executable], [*OURS, *TWO], [*BARE, *TWO]],
    ids=["one process", "two processes", "accelerate launch"],
)
def test_a_closed_terminal_saves_and_stops(
    start: Callable, tmp_path: Path, launcher: list[object]
) -> None:
    terminal = start(*launcher)
    processes = terminal.note_children()
    terminal.hang_up()
    code = terminal.wait()
    for process in processes:
        process.wait(60)
    assert code == 75 or launcher[1:3] == BARE[1:]
    assert_saved(tmp_path / "run")


def test_a_run_under_nohup_outlives_its_terminal(start: Callable, tmp_path: Path) -> None:
    terminal = start("/usr/bin/nohup", *OURS, *TWO)
    assert ignores(terminal.pid, signal.SIGHUP)
    trainers = terminal.note_children() or []
    terminal.hang_up()
    before = num_logged(tmp_path / "run")
    terminal.until(lambda: num_logged(tmp_path / "run") > before + 5)
    assert not list((tmp_path / "run").glob("checkpoints/*"))
    os.kill(terminal.pid, signal.SIGTERM)
    assert terminal.wait() == 75
    for process in trainers:
        process.wait(60)
    assert_saved(tmp_path / "run")


def test_ctrl_c_under_our_launcher_shows_one_line_and_gives_the_code(
    start: Callable, tmp_path: Path
) -> None:
    terminal = start(*OURS, *TWO)
    before = len(terminal.text)
    terminal.press(b"\x03")
    assert terminal.wait() == 75
    shown = terminal.text[before:]
    assert SAVED in shown.splitlines() and "Traceback" not in terminal.text, shown
    assert_saved(tmp_path / "run")


def test_ctrl_c_under_make_shows_the_line_and_no_traceback(
    tmp_path: Path, tiny_configs: dict[str, Path], user_environment: dict[str, str]
) -> None:
    rules = (ROOT / "Makefile").read_text().splitlines()
    (line,) = [line for line in rules if "train_$(MODEL).py" in line]
    assert "launch/run_accelerate.py" in line
    words = [*OURS, *ACCELERATE, LAUNCH / "train_vae.py", "--config", tiny_configs["vae"]]
    words += ["--run.dir", tmp_path / "run", "--run.trackers=[]", f"--train.total_images={10**9}"]
    (tmp_path / "Makefile").write_text(f"train:\n\t@{' '.join(map(str, words))}\n")
    terminal = Terminal(["/usr/bin/make", "train"], user_environment, tmp_path)
    try:
        terminal.until(lambda: num_logged(tmp_path / "run") >= 2)
        terminal.press(b"\x03")
        assert terminal.wait() in (2, -signal.SIGINT)  # as make ends at Ctrl-C
    finally:
        terminal.close()
    assert SAVED in terminal.text.splitlines() and "Traceback" not in terminal.text, terminal.text


def test_our_launcher_passes_on_exit_codes_and_messages(
    run_script: Callable, tmp_path: Path
) -> None:
    dies = tmp_path / "dies.py"
    dies.write_text("import os\nos.kill(os.getpid(), 9)\n")
    mistake = [*ACCELERATE, LAUNCH / "train_vae.py", "--train.total_images=x"]
    for words, code, message in (
        (mistake, 2, "error: train.total_images is x"),
        ([*TWO, dies], 128 + 9, "was ended by SIGKILL"),
    ):
        done = run_script(LAUNCH / "run_accelerate.py", *words)
        assert (done.code, done.stdout) == (code, "")
        assert message in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr and "CalledProcessError" not in done.stderr


IN_A_NOTEBOOK = """
import signal, sys, threading, warnings
import torch
from dgm.cli import train_vae

def state():
    handlers = {n: signal.getsignal(n) for n in signal.valid_signals()}
    hooks = (sys.excepthook, sys.unraisablehook, threading.excepthook, warnings.showwarning)
    return handlers, hooks, torch.get_num_threads(), sys.stdout, sys.stderr

before = state()
assert train_vae.main() == 0
assert state() == before, (before, state())
assert not [t for t in threading.enumerate() if t.name == "watchdog"]
sys.argv[-1] = "--train.total_images=-1"
try:
    train_vae.main()
except ValueError:
    pass
assert state() == before, (before, state())
"""


def test_a_run_in_a_notebook_leaves_signals_hooks_and_threads_as_they_were(
    run_warm: Callable, tiny_configs: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "notebook.py").write_text(IN_A_NOTEBOOK)
    words = ["--config", tiny_configs["vae"], "--run.dir", tmp_path / "run", "--train.threads=1"]
    done = run_warm(tmp_path / "notebook.py", *words, "--train.total_images=32")
    assert done.code == 0, done.stderr


def test_a_request_while_torch_is_imported_is_one_line(
    start_script: Callable, tmp_path: Path
) -> None:
    process = start_script(LAUNCH / "train_vae.py", "--run.dir", tmp_path / "run")
    maps = Path(f"/proc/{process.pid}/maps")
    while process.poll() is None and "libtorch" not in maps.read_text():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (75, "")
    assert stdout == "stopped before its first step: run the same command to continue\n"
    assert not (tmp_path / "run").exists()
