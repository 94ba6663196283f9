"""Every fault of the drill: a few attempts each, or many (see drill.py)."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest

from tests.drills.faults import FAULTS
from tests.drills.lab import Fault, Lab

SEED = os.environ.get("DGM_DRILL_SEED", "0")
ONLY = tuple(os.environ.get("DGM_DRILL_ONLY", "").split(","))
ATTEMPTS = [
    pytest.param(fault, number, id=f"{fault.name} {number}", marks=fault.marks)
    for fault in FAULTS
    if fault.name.startswith(ONLY)
    for number in range(getattr(fault, os.environ.get("DGM_DRILL", "short")))
]

pytestmark = pytest.mark.long


@pytest.fixture(scope="session")
def lab(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Yield one lab for each process of pytest."""
    lab = Lab(tmp_path_factory.mktemp("drill") / "lab", tiny_shards)
    try:
        lab.prepare()
        yield lab
    finally:
        lab.close()


@pytest.mark.parametrize(("fault", "number"), ATTEMPTS)
def test_promise_is_held(
    lab: Lab, fault: Fault, number: int, tmp_path: Path, record_property: Callable
) -> None:
    record_property("fault", (fault.name, fault.promise))
    lab.place = tmp_path
    try:
        outcome = fault.attempt(lab, Random(f"{SEED} {fault.name} {number}"), number)
    finally:
        lab.clear()
        print(f"{tmp_path}\n{lab.output}")  # pytest shows it if the test fails
    record_property("outcome", dataclasses.astuple(outcome))
