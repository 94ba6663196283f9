"""Apply the settings of a process, and start its engine."""

from __future__ import annotations

from dgm.training.engine import Engine
from dgm.training.launch_env import on_gpu
from dgm.training.process_settings import (
    apply_device_settings,
    check_threads,
    end_with_launcher,
    keep_freed_memory,
    use_threads,
)


def start_engine(
    mixed_precision: str = "auto",
    timeout_minutes: float = 30,
    *,
    deterministic: bool = False,
    tf32: bool = False,
    threads: int | None = None,
) -> Engine:
    """Apply process-wide settings and return an engine; parameters as in `TrainConfig`."""
    check_threads(threads)
    apply_device_settings(deterministic, tf32)  # before anything makes a CUDA context
    if not on_gpu():
        keep_freed_memory()
    end_with_launcher()
    engine = Engine(mixed_precision, timeout_minutes)
    use_threads(threads)  # after accelerate, which sets them too
    return engine
