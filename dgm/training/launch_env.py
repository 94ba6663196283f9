"""What `accelerate launch` asked for: read from the variables it sets, refused where unclear."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from dgm.common.errors import UserError

_USES_DEEPSPEED = "ACCELERATE_USE_DEEPSPEED"
_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of linux/prctl.h
_NOT_OURS = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM"}

# Options that accelerate passes on to DeepSpeed alone, and the key that does the same here.
_ONLY_DEEPSPEED = {
    "gradient_accumulation_steps": "train.micro_batch",
    "gradient_clipping": "optim.clip_norm",
}

# Of malloc.h: M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD; and one arena (M_ARENA_MAX), since what the
# backward pass frees, which has a thread of its own, is what the next forward pass needs.
_KEEP = ((-4, 0), (-1, 2**31 - 1), (-2, 2**28), (-8, 1))


# Variables that launchers set, all whole numbers: torch's, and those of MPI's for the same.
_NUMBERS = {
    "RANK": ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"),
    "WORLD_SIZE": ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"),
    "LOCAL_RANK": ("MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK"),
    "LOCAL_WORLD_SIZE": (
        "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE",
    ),
}  # fmt: skip
_AT_LEAST_ONE = ("MASTER_PORT", "OMP_NUM_THREADS", "SLURM_CPUS_PER_TASK")
_THREADS = "OMP_NUM_THREADS"
MAX_THREADS = 1000
DEFAULT_THREADS = "DGM_DEFAULT_THREADS"
"""Variable that a launcher of ours sets where OMP_NUM_THREADS is its own and not the user's."""


@dataclass(frozen=True)
class Zero:
    """What DeepSpeed spreads over processes, and what lies in the host's memory."""

    stage: int
    offload_optimizer: bool = False
    offload_weights: bool = False

    def __str__(self) -> str:
        """Name it for people."""
        where = [name for name in ("optimizer", "weights") if getattr(self, f"offload_{name}")]
        return f"DeepSpeed ZeRO-{self.stage}" + f", {' and '.join(where)} on the CPU" * bool(where)


@dataclass(frozen=True)
class Launched:
    """The engine that was asked for."""

    processes: int
    zero: Zero | None

    def __str__(self) -> str:
        """Name it for people."""
        if self.zero is None and self.processes == 1:
            return "one process"
        return f"{self.zero or 'DDP'} on {self.processes} process" + "es" * (self.processes > 1)


def read_variables() -> None:
    """Read what launchers set into torch's variables; an empty one counts as unset.

    Raises UserError naming a variable that is no number, or does not fit the others.
    """
    for ours, others in _NUMBERS.items():
        for name in (ours, *others):
            _number(name, 1 if name.endswith("SIZE") or name.endswith("NRANKS") else 0)
    for name in _AT_LEAST_ONE:
        _number(name, 1)
    _adopt_mpi()
    world, rank = _number("WORLD_SIZE", 1) or 1, _number("RANK", 0)
    if rank is not None and rank >= world:
        raise UserError(
            f"RANK is {rank}, but WORLD_SIZE is {os.environ.get('WORLD_SIZE', 'not set')}: start "
            "the processes with accelerate launch or torchrun, or unset both"
        )
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        if world > 1 and name not in os.environ:
            raise UserError(
                f"WORLD_SIZE is {world}, but {name} is not set: start the processes with "
                "accelerate launch or torchrun, or unset WORLD_SIZE"
            )


def _number(name: str, least: int) -> int | None:
    text = os.environ.get(name)
    if text is not None and not text.strip():
        del os.environ[name]  # as some launchers leave it; libraries would take it for a number
        return None
    if text is None:
        return None
    if not text.strip().isdecimal() or int(text) < least:
        raise UserError(f"{name} is {text!r}: set it to a whole number from {least} on or unset it")
    return int(text)


def _adopt_mpi() -> None:
    """Take processes that mpirun started for torch's, on one machine without more ado."""
    if "RANK" in os.environ or "WORLD_SIZE" in os.environ:
        return
    found = {
        ours: next((os.environ[name] for name in others if name in os.environ), None)
        for ours, others in _NUMBERS.items()
    }
    if int(found["WORLD_SIZE"] or 1) == 1 or found["RANK"] is None:
        return
    os.environ.update({name: value for name, value in found.items() if value is not None})
    if found["LOCAL_WORLD_SIZE"] == found["WORLD_SIZE"]:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")


def read_launch(precision: str) -> Launched:
    """Read what the launcher asked for; UserError where the trainers cannot do it.

    `precision` is the run's; it decides, and a launcher that says another is refused.
    """
    # `accelerate launch --cpu --num_processes N` starts a single process, and says nothing.
    several = "MASTER_ADDR" in os.environ and _told("ACCELERATE_USE_CPU") == "true"
    if several and not any(name in os.environ for name in ("RANK", "PMI_RANK", "PMI_SIZE")):
        raise UserError(
            "accelerate launch started one process though --num_processes asks for more: "
            "write --multi_gpu instead of --cpu, which serves CPUs too"
        )
    for variable, name in _NOT_OURS.items():
        if _told(variable) == "true":
            raise UserError(
                f"accelerate launch asks for {name}, which the trainers do not know: choose "
                "distributed_type NO, MULTI_GPU or DEEPSPEED"
            )
    _check_agreement(precision)
    zero = _read_zero() if _told(_USES_DEEPSPEED) == "true" else None
    return Launched(int(os.environ.get("WORLD_SIZE", "1")), zero)


def count_nodes() -> int:
    """Count the machines that the launcher started processes on, as many on each."""
    processes, local = (int(os.environ.get(n, "1")) for n in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    # Who starts processes by hand may not say how many there are on a machine.
    return processes // local if "LOCAL_WORLD_SIZE" in os.environ and local > 0 else 1


def _check_agreement(precision: str) -> None:
    """Refuse what the launcher would change behind the run's configuration."""
    told = _told("ACCELERATE_MIXED_PRECISION")
    if told not in ("", "no", precision):
        raise UserError(
            f"accelerate launch asks for mixed_precision {told}, but the run has {precision}: "
            "leave it to train.mixed_precision"
        )
    if _told("ACCELERATE_DYNAMO_BACKEND") not in ("", "no"):
        raise UserError("accelerate launch asks for dynamo_backend: leave it to train.compile")
    for (name, key), neutral in zip(_ONLY_DEEPSPEED.items(), ("1", "none"), strict=True):
        asked = _told(f"ACCELERATE_{name.upper()}") or _option_of_launcher(name)
        if asked not in ("", "auto", neutral):
            raise UserError(f"accelerate launch asks for {name} {asked}: leave it to {key}")


def _option_of_launcher(name: str) -> str:
    """Return the value of an option on the command line of the launcher; '' where it is not there.

    `accelerate launch` exports these options for DeepSpeed only, and drops them without a word
    else. Its processes are its children, so its command line can still be read.
    """
    if "ACCELERATE_DYNAMO_BACKEND" not in os.environ:  # which it always sets
        return ""
    try:
        words = psutil.Process().parent().cmdline()
    except (psutil.Error, AttributeError, OSError):
        return ""
    first = next((k for k, word in enumerate(words) if "accelerate" in Path(word).name), None)
    if first is None:
        return ""
    script = Path(sys.argv[0]).name  # what follows it is the script's own
    found = ""
    for word, following in itertools.pairwise([*words[first + 1 :], ""]):
        if Path(word).name == script:
            break
        option, equals, value = word.partition("=")
        if option.removeprefix("--").replace("-", "_") == name:  # accelerate takes both spellings
            found = value if equals else following
    return found


def _read_zero() -> Zero:
    file = _told("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if file not in ("", "none"):
        raise UserError(
            f"deepspeed_config_file is {file}: the trainers make DeepSpeed's configuration "
            "themselves; give zero_stage and offload_*_device in the accelerate config instead"
        )
    stage = _told("ACCELERATE_DEEPSPEED_ZERO_STAGE") or "2"  # accelerate's default
    if stage not in ("0", "1", "2", "3"):
        raise UserError(f"zero_stage is {stage}: choose 0, 1, 2 or 3")
    zero = Zero(int(stage), _on_cpu("optimizer"), _on_cpu("param"))
    if (zero.offload_weights and zero.stage < 3) or (zero.offload_optimizer and zero.stage < 1):
        raise UserError(
            f"accelerate launch asks for {zero}: the optimizer can be offloaded from stage 1 on, "
            "weights in stage 3"
        )
    return zero


def _on_cpu(what: str) -> bool:
    device = _told(f"ACCELERATE_DEEPSPEED_OFFLOAD_{what.upper()}_DEVICE") or "none"
    if device not in ("none", "cpu"):
        raise UserError(f"offload_{what}_device is {device}: choose none or cpu")
    return device == "cpu"


def _told(variable: str) -> str:
    return os.environ.get(variable, "").lower()


@contextlib.contextmanager
def as_plain_processes() -> Iterator[None]:
    """Let accelerate set up processes without its own DeepSpeed plugin, which serves one net."""
    asked = os.environ.pop(_USES_DEEPSPEED, None)
    try:
        yield
    finally:
        if asked is not None:
            os.environ[_USES_DEEPSPEED] = asked


def keep_freed_memory() -> None:
    """Let a process on a CPU keep the memory of tensors that it freed, for the next step's.

    glibc gives large blocks back at once, and then every step waits for thousands of fresh pages:
    measured with DDPM's U-Net, 5 % of a step. Elsewhere nothing is done.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for parameter, value in _KEEP:
            mallopt(parameter, value)


def on_gpu() -> bool:
    """Return whether a GPU is used: there is one, and accelerate is not configured for CPUs."""
    given = os.environ.get("ACCELERATE_USE_CPU", "").lower()
    return torch.cuda.is_available() and given not in ("1", "true", "t", "yes", "y", "on")


def use_threads(threads: int | None) -> None:
    """Compute with so many threads; for None as OMP_NUM_THREADS says, else with all cores.

    The processes of a machine share its cores; OMP_NUM_THREADS counts where the user set it, not
    where a launcher did.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    elif _THREADS in os.environ and not _set_by_launcher(_THREADS):
        torch.set_num_threads(int(os.environ[_THREADS]))
    elif not on_gpu():
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        cores = count_cores() // processes
        # Slurm binds a process to them on some clusters.
        given = int(os.environ.get("SLURM_CPUS_PER_TASK", cores))
        torch.set_num_threads(max(1, min(cores, given)))


def count_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # as on macOS


def _set_by_launcher(name: str) -> bool:
    """Return whether the launcher that started this process set a variable by itself."""
    if DEFAULT_THREADS in os.environ:
        return True
    if not any(
        each in os.environ for each in ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION")
    ):
        return False
    try:
        started_with = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
    except OSError:  # of another user, or on a system without /proc
        return os.environ[name] == "1"
    return not any(each.startswith(f"{name}=".encode()) for each in started_with)


def end_with_launcher() -> None:
    """Ask for SIGTERM, at which a run saves and stops, should the launcher die before us.

    Its processes have sessions of their own, so that what kills it leaves them behind.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGTERM)
