"""Fifty steps of a family on any engine, and their losses."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import BATCH, LAUNCH, LOSS, SCRIPTS

STEPS = 50


@pytest.fixture(scope="session")
def losses(
    run_warm: Callable, tiny_configs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., list[float]]:
    """Return a maker of a family's losses, of fifty steps or up to `steps`."""

    def run(
        family: str,
        processes: int,
        *options: str,
        steps: int = STEPS,
        folder: Path | None = None,
        zero: str | None = None,
    ) -> list[float]:
        folder = folder or tmp_path_factory.mktemp("processes") / "run"
        words = ["--config", tiny_configs[family], "--run.dir", folder, "--run.trackers", "[]"]
        words += [f"--train.total_images={steps * BATCH}", "--train.save_every_images=0"]
        words = [LAUNCH / SCRIPTS[family], *words, *options]
        done = run_warm(*words, processes=processes, zero=zero)
        assert done.code == 0, done.stderr
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        found = [json.loads(line)[LOSS[family]] for line in lines]
        assert len(found) == steps
        return found

    return run


@pytest.fixture(scope="session")
def losses_alone(losses: Callable) -> Callable[..., list[float]]:
    """Return a maker of the losses of one process, which are computed once."""
    return functools.cache(lambda family, *options: losses(family, 1, *options))


@pytest.fixture(scope="session")
def largest_difference() -> Callable[[list[float], list[float]], float]:
    """Return what gives the largest relative difference."""
    return lambda ours, theirs: max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))
