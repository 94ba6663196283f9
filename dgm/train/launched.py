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

from dgm.errors import UserError

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
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in _KEEP:
            mallopt(parameter, value)


def on_gpu() -> bool:
    """Return whether a GPU is used: there is one, and accelerate is not configured for CPUs."""
    given = os.environ.get("ACCELERATE_USE_CPU", "").lower()
    return torch.cuda.is_available() and given not in ("1", "true", "t", "yes", "y", "on")


def use_all_cores() -> None:
    """Share the machine's cores among its processes; the launchers set one thread for each."""
    if on_gpu() or os.environ.get("OMP_NUM_THREADS", "1") != "1":
        return
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cores = len(os.sched_getaffinity(0)) // processes
    given = int(os.environ.get("SLURM_CPUS_PER_TASK", cores))  # it binds to them on some clusters
    torch.set_num_threads(max(1, min(cores, given)))


def end_with_launcher() -> None:
    """Ask for SIGTERM, at which a run saves and stops, should the launcher die before us.

    Its processes have sessions of their own, so that what kills it leaves them behind.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGTERM)
