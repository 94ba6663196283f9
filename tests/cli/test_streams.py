"""Output without a reader is dropped, the run continues, and no file gets a stream's descriptor."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from tiny import LAUNCH

ROOT = LAUNCH.parent
TWO = [
    LAUNCH / "run_accelerate.py", "--config_file", ROOT / "accelerate_config.yaml",
    "--multi_gpu", "--num_processes", "2", "--main_process_port", "0",
]  # fmt: skip

pytestmark = pytest.mark.slow


def shell(command: str, environment: Mapping[str, str], cwd: Path):
    """Run a line of bash in which `python` is the interpreter of these tests."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-c", command],
        env={**environment, "PATH": path, "PYTHONPATH": str(ROOT)},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def words(tiny_configs: dict[str, Path], tmp_path: Path) -> str:
    config = tiny_configs["vae"]
    options = f"--config {config} --run.dir {tmp_path / 'run'} --train.sample_every_images=16"
    return f"{LAUNCH / 'train_vae.py'} {options}"


def num_logged(run: Path) -> int:
    return (run / "metrics.jsonl").read_bytes().count(b"\n")


@pytest.mark.parametrize(
    ("ending", "processes"),
    [
        ("2>&1 | head -1", 2),
        (">&- 2>&- <&-", 1),
        (">&- 2>&- <&-", 2),
    ],
)
def test_a_training_without_readers_finishes(
    words: str, user_environment: dict, tmp_path: Path, ending: str, processes: int
) -> None:
    launcher = " ".join(map(str, TWO)) if processes == 2 else ""
    ready = f"(python -u {launcher} {words}; echo $? > code) {ending}"
    done = shell(ready, user_environment, tmp_path)
    code = (tmp_path / "code").read_text().strip()
    assert code == "0", done.stderr
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr, done.stderr
    assert num_logged(tmp_path / "run") == 16 and (tmp_path / "run" / "loss.png").exists()


def test_output_on_a_full_disk_is_reported_in_one_line(
    words: str, tiny_shards: Path, user_environment: dict, tmp_path: Path
) -> None:
    for command in (words, f"-m shards.verify {tiny_shards}"):
        done = shell(f"python {command} > /dev/full", user_environment, tmp_path)
        assert done.returncode == 2, done.stderr
        error = done.stderr.splitlines()[-1].replace(";", ":")
        message = "error: standard output: No space left on device: free space there"
        assert error.startswith(message), done.stderr
        assert "Traceback" not in done.stderr and "Exception" not in done.stderr, done.stderr


def test_other_commands_survive_the_end_of_their_reader(
    user_environment: dict, tiny_run: Callable[[str], Path], tmp_path: Path, shape_pictures: Path
) -> None:
    run = tiny_run("vae")
    source = f"--source folder:{shape_pictures}"
    for command, made, ending in (
        (f"{LAUNCH / 'sample.py'} {run} --out made", "made.png", "2>&1 | true"),
        (f"{LAUNCH / 'report.py'} {run} --out page.html", "page.html", ">&-"),
        (f"-m shards.build {source} --split train --out built", "built/index.json", "2>&1 | true"),
        (f"-m slurm.status {run.parent}", "", "2>&1 | true"),
    ):
        line = f"(sleep 0.2; python {command}; echo $? > code) {ending}"
        done = shell(line, user_environment, tmp_path)
        assert (tmp_path / "code").read_text().strip() == "0", (command, ending, done.stderr)
        assert done.stderr == "", (command, ending)
        assert (tmp_path / made).exists()


@pytest.fixture
def script(user_environment: dict, tmp_path: Path) -> Callable:
    """Return a function that runs Python code, with a call of `keep_streams` at each KEEP.

    `ending` is appended to the line of bash.
    """

    def run(code: str, ending: str = "", **variables: str):
        start = "from dgm.common.streams import keep_streams\nkeep_streams()\n"
        (tmp_path / "script.py").write_text(
            "import os, signal, sys\n" + code.replace("KEEP", start)
        )
        return shell(f"python script.py {ending}", {**user_environment, **variables}, tmp_path)

    return run


def test_a_log_file_gets_each_line_immediately(script: Callable, tmp_path: Path) -> None:
    script("KEEP\nprint('data: 7,000 images'); os.kill(os.getpid(), signal.SIGKILL)", "> log")
    assert (tmp_path / "log").read_text() == "data: 7,000 images\n"


@pytest.mark.parametrize("early", [False, True])
def test_descriptors_of_closed_streams_go_to_no_file(
    script: Callable, tmp_path: Path, early: bool
) -> None:
    code = "taken = open('taken', 'w')\n" * early + (
        "KEEP\n"
        "file = open('written', 'w')\n"
        "assert file.fileno() > 2, file.fileno()\n"
        "print('printed'); print('reported', file=sys.stderr)\n"
        "sys.stdout.flush(); os.write(2, b'raw')\n"
    )
    assert script(code, ">&- 2>&- <&-").returncode == 0
    assert (tmp_path / "written").read_text() == ""
    assert not early or "printed" not in (tmp_path / "taken").read_text()


def test_characters_that_the_locale_does_not_know_are_escaped(script: Callable) -> None:
    done = script("KEEP\nprint('caf\\u00e9 \\u732b')\n", PYTHONIOENCODING="ascii:strict")
    assert (done.returncode, done.stdout) == (0, "caf\\xe9 \\u732b\n"), done.stderr
