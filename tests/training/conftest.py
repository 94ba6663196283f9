"""Small nets."""

from __future__ import annotations

import pytest
from torch import nn


@pytest.fixture
def nets() -> dict[str, nn.Module]:
    """Return two small nets, one with buffers."""
    with_buffers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    return {"net": nn.Linear(3, 2), "other": with_buffers}
