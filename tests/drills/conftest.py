"""Twenty-five steps of a family with any engine, and their losses."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import BATCH, LAUNCH, LOSS, SCRIPTS

STEPS = 25


@pytest.fixture(scope="session")
def command(tiny_configs: dict[str, Path]) -> Callable[..., list[object]]:
    """Return a function that returns the command of a family's smallest run."""

    def words(folder: Path, *options: object, family: str = "diffusion") -> list[object]:
        config = ["--config", tiny_configs[family], "--run.dir", folder, "--run.trackers", "[]"]
        return [LAUNCH / SCRIPTS[family], *config, *options]

    return words


@pytest.fixture(scope="session")
def losses(
    command: Callable, run_warm: Callable, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., list[float]]:
    """Return a function that trains a family for `steps` and returns the losses."""

    def run(
        family: str,
        processes: int,
        *options: str,
        steps: int = STEPS,
        folder: Path | None = None,
        zero: str | None = None,
    ) -> list[float]:
        folder = folder or tmp_path_factory.mktemp("processes") / "run"
        cadence = (f"--train.total_images={steps * BATCH}", "--train.save_every_images=0")
        words = command(folder, *cadence, *options, family=family)
        done = run_warm(*words, processes=processes, zero=zero)
        assert done.code == 0, done.stderr
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        found = [json.loads(line)[LOSS[family]] for line in lines]
        assert len(found) == steps
        return found

    return run


@pytest.fixture(scope="session")
def losses_alone(losses: Callable) -> Callable[..., list[float]]:
    """Return a function that returns the losses of one process, computed once."""
    return functools.cache(lambda family, *options: losses(family, 1, *options))


@pytest.fixture(scope="session")
def largest_difference() -> Callable[[list[float], list[float]], float]:
    """Return a function that returns the largest relative difference."""
    return lambda ours, theirs: max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))
