"""Which kernels of our own serve here."""

from __future__ import annotations

import functools
import importlib.util
import warnings
from typing import Literal

import torch

Kernels = Literal["triton", "native"]
"""In Triton, on a GPU; in C++, on a CPU."""


@functools.cache
def kernels_here() -> Kernels | None:
    """Say which kernels serve: on a GPU those in Triton; warns where that is not installed."""
    if not torch.cuda.is_available():
        return "native"
    if importlib.util.find_spec("triton") is None:
        warnings.warn(
            "Triton is not installed, so torch.compile has to do what our kernels do: "
            "pip install triton makes training faster",
            stacklevel=2,
        )
        return None
    return "triton"
