"""Bad input ends with code 2 and one line that names the thing, its value and the remedy."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from optional import need

from tests.bad_inputs import CASES
from tests.bad_inputs.case import Case
from tests.bad_inputs.world import World

EVERY = 5
"""One case in so many of those that need no trained run is in `make check`."""


def marked() -> list[object]:
    """Mark as slow what waits for a trained run or a process of its own, and most others."""
    found, quick = [], 0
    for case in CASES:
        needs_much = case.slow or "runs/" in case.command + case.needs
        fast = not needs_much and quick % EVERY == 0
        quick += not needs_much
        name = case.shown.replace("python launch/", "").replace("python -m ", "")
        found.append(pytest.param(case, id=name, marks=() if fast else pytest.mark.slow))
    return found


@pytest.fixture(scope="module")
def world(run_warm: Callable, tmp_path_factory: pytest.TempPathFactory) -> World:
    """Give the folder in which all mistakes are made."""
    return World(tmp_path_factory.mktemp("bad-inputs") / "here", run_warm)


@pytest.mark.parametrize("case", marked())
def test_bad_input_is_refused_in_one_line_and_leaves_nothing(case: Case, world: World) -> None:
    if "slurm.submit" in case.command:
        need("submitit")
    done, wrong = world.try_out(case)
    assert not wrong, f"{wrong}\n{done.stderr}"


def test_commands_are_all_there() -> None:
    for command in (
        "train_ddpm", "train_gan", "train_vae", "train_flow", "sample", "evaluate", "denoise",
        "explore", "report", "exercises", "benchmark", "shards.build", "shards.verify",
        "slurm.submit", "slurm.status",
    ):  # fmt: skip
        assert sum(command in case.command for case in CASES) >= 3, command
