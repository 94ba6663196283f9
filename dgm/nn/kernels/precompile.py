"""Compile Triton kernels before their first launch, several at once.

    with collect_on(device) as launches:  # kernels are recorded, not launched; outputs are zeros
        objective.loss(...)
    launches.compile()

Otherwise the first step compiles them one by one, which takes some 20 s (docs/performance.md).
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
    """Kernels and their launch arguments, one per specialization (`kinds`)."""

    def __init__(self) -> None:
        self.kinds: dict[Any, tuple[Any, list[Any], dict[str, Any]]] = {}

    def add(self, kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Record a launch."""
        # Triton specializes on a tensor's dtype; keeping only the dtype frees its memory.
        kinds = [arg.dtype if isinstance(arg, Tensor) else arg for arg in args]
        self.kinds.setdefault((kernel, *kinds, *options.items()), (kernel, kinds, options))

    def compile(self, workers: int | None = None) -> int:
        """Compile in threads what Triton's cache lacks; return the number of all specializations.

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
                for kernel, args, options in self.kinds.values():
                    kernel.warmup(*args, grid=(1,), **options)

        # In a copied context, since Triton 3.6 leaves the mode on if compilation fails.
        copy_context().run(compile_all)
        return len(self.kinds)


@contextlib.contextmanager
def collect() -> Iterator[Launches]:
    """Record launches instead of executing them."""
    launches = Launches()
    token = _collected.set(launches)
    try:
        yield launches
    finally:
        _collected.reset(token)


def collect_on(device: torch.device) -> contextlib.AbstractContextManager[Launches]:
    """Record launches on a GPU; do nothing on other devices."""
    return collect() if device.type == "cuda" else contextlib.nullcontext(Launches())


def collecting() -> bool:
    """Return whether launches are only recorded."""
    return _collected.get() is not None


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launch a kernel, or record the launch."""
    launches = _collected.get()
    if launches is None:
        kernel[grid](*args, **options)
    else:
        launches.add(kernel, args, options)
