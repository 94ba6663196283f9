"""Run Triton kernels in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from interpreted import mend_interpreter


@pytest.fixture(autouse=True)
def interpreter() -> None:
    """Make the interpreter work with a newer numpy."""
    if not torch.cuda.is_available() and importlib.util.find_spec("triton") is not None:
        mend_interpreter()
