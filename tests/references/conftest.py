"""Fixtures of the reference tests; `one_thread` and `seed` apply to each of them."""

from collections.abc import Iterator

import pytest
import torch
from small_sizes import one_thread, seed

from dgm.train.engine import Engine

__all__ = ["one_thread", "seed"]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """Return an engine of one process."""
    for name in ("MASTER_ADDR", "RANK", "WORLD_SIZE", "LOCAL_RANK", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)
    made = Engine("no")
    torch.set_num_threads(1)
    yield made
