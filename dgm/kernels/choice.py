"""Where kernels in Triton run."""

from __future__ import annotations

import functools
import importlib.util
import warnings

import torch


@functools.cache
def usable() -> bool:
    """Say whether kernels run here: on a GPU where Triton is installed; warns where it is not."""
    if not torch.cuda.is_available():
        return False
    if importlib.util.find_spec("triton") is None:
        warnings.warn(
            "Triton is not installed, so torch.compile has to do what our kernels do: "
            "pip install triton makes training faster",
            stacklevel=2,
        )
        return False
    return True
