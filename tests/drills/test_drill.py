"""The drill's short version: every fault, a few attempts each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from tests.drills.drill import choose, table, try_fault
from tests.drills.faults import FAULTS
from tests.drills.lab import Fault, Lab, NotPossible, Outcome, open_lab


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Yield one lab for each process of pytest."""
    with open_lab(tmp_path_factory.mktemp("drill") / "lab") as lab:
        yield lab


@pytest.mark.long
@pytest.mark.parametrize("fault", [pytest.param(f, id=f.name) for f in FAULTS if f.short])
def test_promise_is_held(lab: Lab, fault: Fault) -> None:
    row = try_fault(fault, lab, fault.short, seed=0)
    print(table([row]))
    assert not row.broken, "\n".join(row.broken)
    if row.not_possible:
        # Not skipped: the machine does not allow the fault, and .ci/run refuses skips.
        pytest.xfail(row.not_possible)
    assert row.tried == fault.short


def test_row_has_the_results_of_all_attempts(tmp_path: Path) -> None:
    lab = Lab(tmp_path)

    def attempt(lab: Lab, random: Random, number: int) -> Outcome:
        lab.new().mkdir(parents=True)
        lab.output = "its output"
        lab.expect(number != 1, "it broke")
        return Outcome(images_lost=16 * number, seconds=number / 2)

    row = try_fault(Fault("a fault", "held", 0, 4, attempt), lab, 4, seed=0)
    assert (row.tried, row.images_lost, row.seconds) == (4, 48, 1.5)
    kept = list((tmp_path / "attempts").iterdir())  # only that of the broken attempt
    assert len(kept) == 1
    assert row.broken == [f"attempt 1: it broke\n  kept: {kept[0]}\n  output: its output"]
    assert table([row]).splitlines()[2] == "| a fault | 4 | held | broken 1 times | 48 | 1.5 |"


def test_fault_that_is_not_possible_here_is_listed_with_the_reason(tmp_path: Path) -> None:
    def attempt(lab: Lab, random: Random, number: int) -> Outcome:
        raise NotPossible("no mounting")

    row = try_fault(Fault("a fault", "held", 0, 4, attempt), Lab(tmp_path), 4, seed=0)
    assert (
        table([row]).splitlines()[2]
        == "| a fault | 0 | held | not possible here: no mounting | - | - |"
    )


def test_draws_of_an_attempt_follow_from_the_seed(tmp_path: Path) -> None:
    lab, drawn = Lab(tmp_path), []

    def attempt(lab: Lab, random: Random, number: int) -> Outcome:
        drawn.append(random.random())
        return Outcome()

    for seed in (0, 0, 1):
        try_fault(Fault("a fault", "held", 0, 2, attempt), lab, 2, seed)
    assert drawn[:2] == drawn[2:4] != drawn[4:]
    assert len(set(drawn[:2])) == 2


def test_faults_are_chosen_by_name() -> None:
    chosen = [fault.name for fault in choose("SIGKILL in a build,disk full")]
    assert chosen[0] == "SIGKILL in a build, at each file" and len(chosen) == 4
    with pytest.raises(SystemExit, match="error: --only quake is not a fault: choose from SIGKILL"):
        choose("SIGKILL,quake")
