"""Decisions after a start has ended, ports for the rendezvous, environment of the ranks."""

from __future__ import annotations

import socket
import subprocess
from pathlib import Path

import pytest

from slurm.exit_policy import decide
from slurm.job import RANK_SCRIPT, free_port
from slurm.run_state import RunState

KILLED, TERMINATED = 137, 143


@pytest.mark.parametrize(
    ("code", "rank_codes", "requested", "progress", "failures", "expected"),
    [
        (0, [0, 0], False, True, 0, ("done", "nothing", 0)),
        (0, [0, 0], True, True, 0, ("done", "nothing", 0)),  # requested to stop after the last step
        # srun ends the others, and their code is the higher one.
        (TERMINATED, [2], False, False, 0, ("mistake", "nothing", 2)),
        (TERMINATED, [75], False, True, 0, ("stopped", "requeue", 75)),
        (75, [75, 75], False, False, 0, ("stopped", "requeue", 75)),
        (128 + 12, [], False, False, 0, ("stopped", "requeue", 75)),  # SIGUSR2 before its handler
        (KILLED, [], True, False, 0, ("stopped", "requeue", 75)),
        (KILLED, [], False, True, 2, ("fault", "again", 1)),
        (KILLED, [], False, False, 0, ("fault", "requeue", 1)),
        (1, [1], False, False, 1, ("fault", "requeue", 1)),
        (1, [1], False, False, 2, ("fault", "give up", 1)),
    ],
)
def test_decisions(
    code: int, rank_codes: list, requested: bool, progress: bool, failures: int, expected: tuple
) -> None:
    found = decide(code, rank_codes, requested, progress, failures, max_faults=3)
    assert (found.outcome, found.action, found.exit_code) == expected


def test_faults_without_progress_are_counted_until_there_is_some(tmp_path: Path) -> None:
    run = RunState(tmp_path)
    run.folder.mkdir()
    for progress, expected in ((False, 1), (False, 2), (True, 0), (False, 1)):
        run.add_event("start", submission="first", images=0)
        run.add_event("end", submission="first", verdict="fault", progress=progress)
        assert run.failures_in_a_row("first") == expected
    assert run.failures_in_a_row("second") == 0  # submitted again by the user


def test_each_start_has_its_own_free_port() -> None:
    ports = {free_port(f"{job}.0.{attempt}") for job in range(20) for attempt in range(5)}
    assert len(ports) > 95
    assert all(20_000 <= port < 32_000 for port in ports)
    first = free_port("7.0.0")
    assert free_port("7.0.0") == first
    with socket.socket() as taken:
        taken.bind(("", first))
        assert free_port("7.0.0") == first + 1


def rank(folder: Path, **variables: str) -> subprocess.CompletedProcess:
    """Run a rank's script as srun would, and return the result: its variables, in stdout."""
    given = {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7"}
    given |= {"SLURMD_NODENAME": "n2", "DGM_RUN_FOLDER": str(folder), "PATH": "/usr/bin:/bin"}
    given |= {"DGM_EXIT_CODES": str(folder.parent / "codes"), **variables}
    show = 'echo "$1" $RANK $LOCAL_RANK $MASTER_ADDR $OMP_NUM_THREADS'
    words = ["bash", "-c", RANK_SCRIPT, "rank", "bash", "-c", show, "show", "two words"]
    return subprocess.run(words, env=given, capture_output=True, text=True)


def test_ranks_have_torchs_environment_variables(tmp_path: Path) -> None:
    assert rank(tmp_path).stdout == "two words 3 1 10.0.0.7 1\n"
    both = rank(tmp_path, CUDA_VISIBLE_DEVICES="0,1", OMP_NUM_THREADS="4")
    assert both.stdout == "two words 3 1 10.0.0.7 4\n"
    assert rank(tmp_path, CUDA_VISIBLE_DEVICES="").stdout == "two words 3 1 10.0.0.7 1\n"
    # A process that sees only its own GPU has local rank 0.
    assert rank(tmp_path, CUDA_VISIBLE_DEVICES="1").stdout == "two words 3 0 10.0.0.7 1\n"


def test_a_node_that_does_not_see_the_run_folder_is_an_error(tmp_path: Path) -> None:
    done = rank(tmp_path / "nowhere")
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: node n2 does not see {tmp_path}/nowhere: put run.dir on a disk")
    assert (tmp_path / "codes").read_text() == "2\n"  # a mistake, after which nothing is retried
