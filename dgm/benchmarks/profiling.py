"""What a profiler's trace says of a training step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.autograd import DeviceType


def time_by_name(averages: Iterable[Any], on_gpu: bool) -> dict[str, float]:
    """Sum microseconds by name: of a GPU's kernels and copies, or of operators' own time on a CPU.

    `averages` is the profiler's `key_averages()`. There the operator that launched a kernel has the
    kernel's time too, as has an annotation around both: each is counted once.
    """
    spent: dict[str, float] = {}
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    for event in averages:
        if event.device_type != kind or event.is_user_annotation:
            continue
        time = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        spent[event.key] = spent.get(event.key, 0.0) + time
    return spent


def count_conversions(events: Any) -> int:
    """Count how often convolutions had to copy images into another order of memory."""
    return sum(
        event.name == "aten::contiguous"
        and event.cpu_parent is not None
        and "convolution" in event.cpu_parent.name
        for event in events
    )
