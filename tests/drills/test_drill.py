"""The drill's short version: every fault, some tries each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.drills.drill import table, try_fault
from tests.drills.faults import FAULTS
from tests.drills.lab import Fault, Lab, opened

pytestmark = [pytest.mark.long]


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Open one laboratory for each process of pytest."""
    with opened(tmp_path_factory.mktemp("drill") / "lab") as lab:
        yield lab


@pytest.mark.parametrize("fault", [pytest.param(f, id=f.name) for f in FAULTS if f.short])
def test_promise_is_held(lab: Lab, fault: Fault) -> None:
    row = try_fault(fault, lab, fault.short, seed=0)
    print(table([row]))
    assert not row.broken, "\n".join(row.broken)
    if row.not_possible:
        pytest.skip(row.not_possible)
    assert row.tried == fault.short
