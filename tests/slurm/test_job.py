"""What the end of a start means, and where processes meet."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from slurm.ports import free_port
from slurm.record import Record
from slurm.verdict import judge

KILLED, TERMINATED = 137, 143


@pytest.mark.parametrize(
    ("code", "said", "asked", "progress", "faults", "expected"),
    [
        (0, [0, 0], False, True, 0, ("done", "nothing", 0)),
        (0, [0, 0], True, True, 0, ("done", "nothing", 0)),  # asked to stop after the last step
        # srun ends the others, and their code is the higher one.
        (TERMINATED, [2], False, False, 0, ("mistake", "nothing", 2)),
        (TERMINATED, [75], False, True, 0, ("stopped", "requeue", 75)),
        (75, [75, 75], False, False, 0, ("stopped", "requeue", 75)),
        (128 + 12, [], False, False, 0, ("stopped", "requeue", 75)),  # SIGUSR2 before it listened
        (KILLED, [], True, False, 0, ("stopped", "requeue", 75)),
        (KILLED, [], False, True, 2, ("fault", "again", 1)),
        (KILLED, [], False, False, 0, ("fault", "requeue", 1)),
        (1, [1], False, False, 1, ("fault", "requeue", 1)),
        (1, [1], False, False, 2, ("fault", "give up", 1)),
    ],
)
def test_verdicts(
    code: int, said: list[int], asked: bool, progress: bool, faults: int, expected: tuple
) -> None:
    found = judge(code, said, asked, progress, faults, max_faults=3)
    assert (found.name, found.next, found.code) == expected


def test_faults_without_progress_are_counted_until_there_is_some(tmp_path: Path) -> None:
    record = Record(tmp_path)
    record.folder.mkdir()
    for progress, expected in ((False, 1), (False, 2), (True, 0), (False, 1)):
        record.add("start", images=0)
        record.add("end", verdict="fault", progress=progress)
        assert record.fruitless() == expected
    record.add("submitted", job="2")  # by a person, who may have mended it
    assert record.fruitless() == 0


def test_port_is_free_and_another_for_each_start() -> None:
    ports = {free_port(f"{job}.0.{attempt}") for job in range(20) for attempt in range(5)}
    assert len(ports) > 95
    assert all(20_000 <= port < 32_000 for port in ports)
    first = free_port("7.0.0")
    assert free_port("7.0.0") == first
    with socket.socket() as taken:
        taken.bind(("", first))
        assert free_port("7.0.0") == first + 1
