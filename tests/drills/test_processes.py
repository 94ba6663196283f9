"""Train on one, two and four processes: the losses are the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

STEPS = 25
GAN = pytest.param("gan", marks=pytest.mark.long)
LONG = [pytest.param(family, marks=pytest.mark.long) for family in ("vae", "flow")]
FAMILIES = ["diffusion", GAN, *LONG]

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("options", "numbers", "tolerance"),
    [
        # Sums in another order round differently in fp32, amplified a little by each update.
        pytest.param([], (4,), 1e-5, id="fp32", marks=pytest.mark.long),
        # In fp64 rounding cannot hide a draw that differs.
        pytest.param(["--train.float64"], (2, 4), 1e-10, id="fp64"),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_those_of_one_process(
    losses: Callable,
    losses_alone: Callable,
    largest_difference: Callable,
    family: str,
    options: list[str],
    numbers: tuple[int, ...],
    tolerance: float,
) -> None:
    alone = losses_alone(family, *options)
    assert min(alone[-5:]) < 0.95 * alone[0], "the run does not learn"
    for processes in numbers:
        difference = largest_difference(losses(family, processes, *options), alone)
        print(f"{family}: {processes} processes differ from one by {difference:.1e}")
        assert difference < tolerance, f"{processes} processes"


@pytest.mark.parametrize("family", ["diffusion", *LONG])  # a GAN's BatchNorm forbids it
def test_accumulated_micro_batches_give_the_losses_of_the_batch(
    losses: Callable, losses_alone: Callable, largest_difference: Callable, family: str
) -> None:
    accumulated = losses(family, 1, "--train.float64", "--train.micro_batch=4")
    difference = largest_difference(accumulated, losses_alone(family, "--train.float64"))
    print(f"{family}: micro-batches of 4 differ from the batch by {difference:.1e}")
    assert difference < 1e-10


@pytest.mark.parametrize("family", FAMILIES)
def test_run_continues_with_the_same_losses_on_another_number_of_processes(
    losses: Callable,
    losses_alone: Callable,
    largest_difference: Callable,
    tmp_path: Path,
    family: str,
) -> None:
    for processes, steps in ((2, 12), (1, STEPS)):
        folder = tmp_path / "run"
        found = losses(family, processes, "--train.float64", steps=steps, folder=folder)
    difference = largest_difference(found, losses_alone(family, "--train.float64"))
    print(f"{family}: two processes, then one, differ from one by {difference:.1e}")
    assert difference < 1e-10
