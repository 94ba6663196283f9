"""A trainer of the smallest runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import LAUNCH, SCRIPTS
from warm_processes import Result


@pytest.fixture
def train(
    run_warm: Callable[..., Result], tiny_configs: dict[str, Path], tmp_path: Path
) -> Callable[..., Result]:
    """Return a function that trains a family's smallest run in the folder `tmp_path / "run"`."""

    def start(*options: object, family: str = "vae", **how) -> Result:
        words = ["--config", tiny_configs[family], "--run.dir", tmp_path / "run"]
        return run_warm(LAUNCH / SCRIPTS[family], *words, "--run.trackers=[]", *options, **how)

    return start
