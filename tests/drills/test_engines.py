"""Train under DeepSpeed ZeRO, with real processes: the losses are those of one process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import SCRIPTS

pytestmark = pytest.mark.slow

ENGINES = [(family, stage, []) for stage in "123" for family in SCRIPTS]
# With micro-batches too: each adds its gradient, and the last of a step is averaged.
ENGINES += [
    ("diffusion", "0", ["--train.micro_batch=4"]),
    ("vae", "2_offload", ["--train.micro_batch=4"]),
    ("flow", "3_offload", ["--train.micro_batch=4"]),
]


@pytest.mark.parametrize(("family", "zero", "options"), ENGINES)
def test_losses_under_zero_are_those_of_one_process(
    losses: Callable,
    losses_alone: Callable,
    largest_difference: Callable,
    tmp_path: Path,
    family: str,
    zero: str,
    options: list[str],
) -> None:
    found = losses(family, 2, *options, folder=tmp_path / "run", zero=zero)
    difference = largest_difference(found, losses_alone(family))
    print(f"{family}: ZeRO-{zero} on 2 processes differs from one by {difference:.1e}")
    assert difference < 1e-5
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    where = {
        "2_offload": ", optimizer on the CPU",
        "3_offload": ", optimizer and weights on the CPU",
    }
    engine = f"DeepSpeed ZeRO-{zero[0]}{where.get(zero, '')} on 2 processes"
    assert environment["engine"] == engine
