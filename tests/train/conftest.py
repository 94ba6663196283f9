"""One engine of one process, and small nets."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from dgm.train.engine import Engine


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compute on one thread, from the same first weights."""
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # an engine takes all cores where this is 1
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    """Return an engine of this process alone, whatever launched the tests."""
    for name in ("MASTER_ADDR", "RANK", "WORLD_SIZE", "LOCAL_RANK", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)
    return Engine("no")


@pytest.fixture
def nets() -> dict[str, nn.Module]:
    """Return two small nets, one with buffers."""
    with_buffers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    return {"net": nn.Linear(3, 2), "other": with_buffers}
