"""Bad input ends with exit code 2 and one line with the thing, its value and the remedy.

`pytest tests/test_bad_inputs.py -rP -k sample` prints the messages of a command.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from optional import need

from tests.bad_inputs import CASES
from tests.bad_inputs.case import Case
from tests.bad_inputs.world import World

EVERY = 5
"""`make check` runs every fifth case that needs no trained run."""


def marked() -> list[object]:
    """Return the cases as parameters; all but some quick ones are slow."""
    params, quick = [], 0
    for case in CASES:
        needs_much = case.slow or "runs/" in case.command + case.needs
        fast = not needs_much and quick % EVERY == 0
        quick += not needs_much
        name = case.command.replace("python launch/", "").replace("python -m ", "")
        params.append(pytest.param(case, id=name, marks=() if fast else pytest.mark.slow))
    return params


@pytest.fixture(scope="module")
def world(
    run_warm: Callable,
    shape_pictures: Path,
    tiny_shards: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> World:
    """Return the folder in which all cases run."""
    return World(tmp_path_factory.mktemp("bad-inputs"), run_warm, shape_pictures, tiny_shards)


@pytest.mark.parametrize("case", marked())
def test_bad_input_is_one_line_and_leaves_nothing(case: Case, world: World) -> None:
    if "slurm.submit" in case.command:
        need("submitit")
    print(world.check(case))


def test_every_command_has_cases() -> None:
    for command in (
        "train_ddpm", "train_gan", "train_vae", "train_flow", "sample", "evaluate", "denoise",
        "explore", "report", "exercises", "benchmark", "shards.build", "shards.verify",
        "slurm.submit", "slurm.status",
    ):  # fmt: skip
        assert sum(command in case.command for case in CASES) >= 3, command
