"""Compile Triton kernels before their first launch, several at once.

    with collect_on(device) as launches:  # kernels are noted, not launched; outputs are zeros
        objective.loss(...)
    launches.compile()

Otherwise the first step compiles them one by one, for some 20 s (docs/performance.md).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar, copy_context
from typing import Any

import torch
from torch import Tensor

_collected: ContextVar[Launches | None] = ContextVar("collected", default=None)


class Launches:
    """Kernels and the arguments of their launches, each specialization (`kinds`) once."""

    def __init__(self) -> None:
        self.kinds: dict[Any, tuple[Any, list[Any], dict[str, Any]]] = {}

    def add(self, kernel: Any, given: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Note a launch."""
        # Of a tensor its dtype only: that is what Triton compiles for, and it holds no memory.
        kinds = [part.dtype if isinstance(part, Tensor) else part for part in given]
        self.kinds.setdefault((kernel, *kinds, *options.items()), (kernel, kinds, options))

    def compile(self, workers: int | None = None) -> int:
        """Compile what Triton's cache does not hold, by threads; return how many kinds there are.

        Triton's Python code holds the GIL; the rest, which takes most of the time, does not.
        """
        if not self.kinds:
            return 0
        from triton import AsyncCompileMode

        count = workers or (
            len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        )

        def compile_all() -> None:
            with ThreadPoolExecutor(count) as pool, AsyncCompileMode(pool):
                for kernel, given, options in self.kinds.values():
                    kernel.warmup(*given, grid=(1,), **options)

        # Triton 3.6 leaves the mode on where a kernel cannot be compiled: in a context of its own.
        copy_context().run(compile_all)
        return len(self.kinds)


@contextlib.contextmanager
def collect() -> Iterator[Launches]:
    """Note launches instead of making them."""
    launches = Launches()
    token = _collected.set(launches)
    try:
        yield launches
    finally:
        _collected.reset(token)


def collect_on(device: torch.device) -> contextlib.AbstractContextManager[Launches]:
    """Note launches on a GPU; elsewhere there are none, and all runs as it is."""
    return collect() if device.type == "cuda" else contextlib.nullcontext(Launches())


def collecting() -> bool:
    """Return whether launches are noted only."""
    return _collected.get() is not None


def launch(kernel: Any, grid: tuple[int, ...], *given: Any, **options: Any) -> None:
    """Launch a kernel, or note the launch."""
    launches = _collected.get()
    if launches is None:
        kernel[grid](*given, **options)
    else:
        launches.add(kernel, given, options)
