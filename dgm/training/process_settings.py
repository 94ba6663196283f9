"""Settings of a process (algorithms, precision, threads, memory), and the start of its engine."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import warnings
from pathlib import Path

import torch

from dgm.common.errors import UserError
from dgm.training.engine import Engine
from dgm.training.launch_env import on_gpu

MAX_THREADS = 1000
DEFAULT_THREADS = "DGM_DEFAULT_THREADS"
"""Variable that our launchers set if OMP_NUM_THREADS is theirs and not the user's."""

_THREADS = "OMP_NUM_THREADS"
_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
_REPRODUCIBLE_WORKSPACES = (":4096:8", ":16:8")  # torch accepts no other for deterministic products
_INDUCTOR = "TORCHINDUCTOR_DETERMINISTIC"
_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of linux/prctl.h
# Parameters of mallopt (malloc.h): M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD; and one arena
# (M_ARENA_MAX), since the next forward pass needs what the backward pass, which has a thread of its
# own, frees.
_MALLOC_OPTIONS = ((-4, 0), (-1, 2**31 - 1), (-2, 2**28), (-8, 1))


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


def apply_device_settings(deterministic: bool = False, tf32: bool = False) -> None:
    """Set algorithms and precision of everything that this process computes from now on.

    Call it before the CUDA context is created, which is when cuBLAS reads its variable.
    Raise UserError if the environment sets a cuBLAS workspace that is not reproducible.
    """
    if deterministic:
        found = os.environ.setdefault(_CUBLAS, _REPRODUCIBLE_WORKSPACES[0])
        if found not in _REPRODUCIBLE_WORKSPACES:
            raise UserError(
                f"train.deterministic is true, but {_CUBLAS} is {found!r}, with which matrix "
                "products are not reproducible: unset it, or set it to "
                f"{' or '.join(_REPRODUCIBLE_WORKSPACES)}"
            )
    _set_algorithms(deterministic)
    # Torch's default is TF32 for convolutions only. Use the older names: libraries still read them,
    # and that raises an error once the newer `fp32_precision` has been set (torch 2.11 and 2.15),
    # whereas the newer ones can be read after the older ones have been set.
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    # The compiler recommends TF32, which train.tf32 decides.
    warnings.filterwarnings("ignore", "TensorFloat32 tensor cores", UserWarning)


def _set_algorithms(deterministic: bool) -> None:
    # Like torch.use_deterministic_algorithms, but without importing the compiler to set its flag,
    # which takes two seconds even where nothing is compiled.
    torch.set_deterministic_debug_mode("error" if deterministic else "default")
    if deterministic:
        os.environ[_INDUCTOR] = "1"  # read when the compiler is imported, also by its workers
        inductor = sys.modules.get("torch._inductor.config")
        if inductor is not None:
            inductor.deterministic = True  # type: ignore[attr-defined]
    # Filling new tensors with NaN costs time and only helps debugging: all are written to.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic = deterministic
    # Autotuning of convolutions is worth it, since shapes are constant, but not reproducible.
    torch.backends.cudnn.benchmark = on_gpu() and not deterministic


def keep_freed_memory() -> None:
    """Make malloc keep freed tensors' memory for the next step (glibc on Linux only).

    By default large blocks are returned at once, and every step faults in thousands of new pages:
    5 % of a step, measured with DDPM's U-Net.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for parameter, value in _MALLOC_OPTIONS:
            mallopt(parameter, value)


def end_with_launcher() -> None:
    """Receive SIGTERM, on which a run saves and stops, if torch's launcher dies first.

    A signal that kills the launcher does not reach its processes, which are in other sessions.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGTERM)


def check_threads(threads: int | None) -> None:
    """Raise UserError where the number of threads is out of range."""
    if threads is not None and not 1 <= threads <= MAX_THREADS:
        raise UserError(f"train.threads is {threads}: choose 1 to {MAX_THREADS}")


def use_threads(threads: int | None) -> None:
    """Compute with `threads`; None: the user's OMP_NUM_THREADS; without it, on a CPU, all cores.

    The processes of a machine divide its cores. An OMP_NUM_THREADS set by a launcher is ignored.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    elif _THREADS in os.environ and not _set_by_launcher(_THREADS):
        torch.set_num_threads(int(os.environ[_THREADS]))
    elif not on_gpu():
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        # Without this call, as on macOS, a process may use all cores.
        usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
        cores = (len(usable) or os.cpu_count() or 1) // processes
        # Some Slurm clusters bind processes to cores, others only set this variable.
        allotted = int(os.environ.get("SLURM_CPUS_PER_TASK", cores))
        torch.set_num_threads(max(1, min(cores, allotted)))


def _set_by_launcher(name: str) -> bool:
    """Return whether a variable was set by the launcher that started this process."""
    if DEFAULT_THREADS in os.environ:
        return True
    if not any(v in os.environ for v in ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION")):
        return False
    try:
        started_with = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
    except OSError:  # another user's process, or a system without /proc
        return os.environ[name] == "1"
    return not any(entry.startswith(f"{name}=".encode()) for entry in started_with)
