"""The memory that the nets of a configuration need, computed before they are allocated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psutil
import torch

from dgm.common.errors import UserError

_ON_CPU = 5  # copies of the weights: themselves, gradient, average, two moments
_OVERFLOW = ("overflow", "Overflow")


def build_on_meta(
    make_parts: Callable[..., Any], config: Any, image_shape: tuple[int, int, int], num_classes: int
) -> tuple[Any, int]:
    """Return the family's parts on the meta device, and the bytes of their weights.

    Raise UserError for a tensor larger than torch supports.
    """
    try:
        with torch.device("meta"):
            parts = make_parts(config, image_shape, num_classes)
    except (RuntimeError, OverflowError) as error:
        if not any(word in str(error) for word in _OVERFLOW):
            raise
        raise UserError(
            f"{_sizes(config)} give nets larger than any memory: choose smaller numbers"
        ) from None
    return parts, sum(p.nbytes for net in parts.nets.values() for p in net.parameters())


def check_memory(
    make_parts: Callable[..., Any], config: Any, image_shape: tuple[int, int, int], num_classes: int
) -> None:
    """Raise UserError if the nets of this configuration do not fit the images or the memory."""
    size = build_on_meta(make_parts, config, image_shape, num_classes)[1]
    copies = 1 if torch.cuda.is_available() else _ON_CPU
    memory = psutil.virtual_memory().total
    if copies * size > memory:
        raise UserError(
            f"{_sizes(config)} give {size / 1e9:,.1f} GB of weights, of which a run on this "
            f"machine keeps {copies} cop{'y' if copies == 1 else 'ies'} in "
            f"{memory / 1e9:,.1f} GB of memory: choose smaller numbers"
        )


def _sizes(config: Any) -> str:
    """Return the settings that determine the nets' size."""
    return ", ".join(
        f"model.{name} {value}"
        for name, value in vars(config.model).items()
        if isinstance(value, int | list) and not isinstance(value, bool)
    )
