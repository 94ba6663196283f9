"""The drill's short version: every fault, a few attempts each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from tests.drills.drill import attempt, choose, table
from tests.drills.faults import FAULTS
from tests.drills.lab import Fault, Lab, NotPossible, Outcome, opened


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Open one lab for each process of pytest."""
    with opened(tmp_path_factory.mktemp("drill") / "lab") as lab:
        yield lab


@pytest.mark.long
@pytest.mark.parametrize("fault", [pytest.param(f, id=f.name) for f in FAULTS if f.short])
def test_promise_is_held(lab: Lab, fault: Fault) -> None:
    row = attempt(fault, lab, fault.short, seed=0)
    print(table([row]))
    assert not row.broken, "\n".join(row.broken)
    if row.not_possible:
        pytest.xfail(row.not_possible)  # not skipped: the machine forbids it
    assert row.tried == fault.short


def test_broken_promises_are_reported_and_their_folders_kept(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    drawn = []

    def break_once(lab: Lab, random: Random, number: int) -> Outcome:
        drawn.append(random.random())
        lab.new().mkdir(parents=True)
        lab.output = "its output"
        assert number != 1, "it broke"
        return Outcome(images_repeated=16 * number, seconds=number / 2)

    fault = Fault("a fault", "held", 0, 4, break_once)
    rows = [attempt(fault, lab, 4, seed) for seed in (0, 0, 1)]
    assert table(rows[:1]).splitlines()[2] == "| a fault | 4 | held | broken 1 times | 48 | 1.5 |"
    kept = sorted((tmp_path / "tries").iterdir())
    assert len(kept) == 3 and f"kept: {kept[0]}\n  output: its output" in rows[0].broken[0]
    assert drawn[:4] == drawn[4:8] != drawn[8:] and len(set(drawn[:4])) == 4


def test_fault_that_cannot_be_created_is_not_held(tmp_path: Path) -> None:
    def fail(lab: Lab, random: Random, number: int) -> Outcome:
        raise NotPossible("no mounting")

    row = attempt(Fault("a fault", "held", 0, 4, fail), Lab(tmp_path), 4, seed=0)
    assert row.cells() == ["a fault", "0", "held", "not possible here: no mounting", "-", "-"]


def test_faults_are_chosen_by_name() -> None:
    chosen = [fault.name for fault in choose("SIGKILL in a sweep,disk full")]
    assert chosen == ["SIGKILL in a sweep's submission", "disk full in a save"]
    with pytest.raises(SystemExit, match="error: --only quake is no fault: choose of SIGKILL"):
        choose("SIGKILL,quake")
