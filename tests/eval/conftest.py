"""One process to measure on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from dgm.train.engine import Engine


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    for name in ("MASTER_ADDR", "RANK", "WORLD_SIZE", "LOCAL_RANK", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)
    made = Engine("no")
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # nets so small only wait for a second one
    yield made
    torch.set_num_threads(before)
