"""Choice between this package's kernels and torch's operators."""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dgm.nn.kernels import precompile

Kernels = Literal["triton", "native"]
"""triton: on a GPU; native: C++, on a CPU."""


def under_transform() -> bool:
    """Return whether a torch.func transform or forward-mode differentiation is active.

    The custom operators silently drop tangents and have no torch.func rules, so callers then use
    torch's operators.
    """
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


# torch.compile must evaluate this at trace time rather than trace it. The attribute is what
# torch.compiler.assume_constant_result sets, without importing the compiler.
under_transform._dynamo_marked_constant = True  # type: ignore[attr-defined]


def refuse_transform(operator: str) -> None:
    """Raise NotImplementedError if a custom operator would drop a tangent."""
    if under_transform():
        raise NotImplementedError(
            f"{operator} has no forward-mode derivative or torch.func rule: call its wrapper in "
            "dgm.nn.kernels, which falls back to torch's operators"
        )


def channels_last(image: Any) -> Any:
    """Return an image [B, C, H, W] contiguous in channels_last; None for None."""
    return None if image is None else image.contiguous(memory_format=torch.channels_last)


def empty_channels_last(x: Tensor, channels: int) -> Tensor:
    """Return an uninitialized [B, channels, H, W] in channels_last, otherwise like x."""
    shape, layout = (x.shape[0], channels, *x.shape[2:]), torch.channels_last
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)


def kernels_for(device: torch.device) -> Kernels | None:
    """Return the kernels for tensors on a device; None if there are none."""
    if device.type == "cpu":
        return "native"
    return "triton" if device.type == "cuda" and has_triton() else None


@functools.cache
def has_triton() -> bool:
    """Return whether Triton is installed and torch built for CUDA; warn once if it is missing."""
    if torch.version.hip is not None:  # AMD: the kernels contain NVIDIA's PTX
        return False
    found = importlib.util.find_spec("triton") is not None
    if not found:
        warnings.warn(
            "Triton is not installed, so torch.compile replaces the Triton kernels: "
            "pip install triton makes training faster",
            stacklevel=2,
        )
    return found


def triton_runs_on(device: torch.device) -> bool:
    """Return whether Triton's kernels can run on a device: a GPU, or a CPU in its interpreter."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return device.type == "cuda" or interpreted or precompile.collecting()


triton_runs_on._dynamo_marked_constant = True  # type: ignore[attr-defined]
