"""The engine that the launcher requests, read from its environment variables."""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from dgm.common.errors import UserError

_USES_DEEPSPEED = "ACCELERATE_USE_DEEPSPEED"
_UNSUPPORTED = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM"}

# Options that accelerate passes to DeepSpeed only, and the key of ours with the same effect.
_ONLY_DEEPSPEED = {
    "gradient_accumulation_steps": "train.micro_batch",
    "gradient_clipping": "optim.clip_norm",
}

# Integer variables of torch's launcher, and MPI launchers' variables of the same meaning.
_NUMBERS = {
    "RANK": ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"),
    "WORLD_SIZE": ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"),
    "LOCAL_RANK": ("MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK"),
    "LOCAL_WORLD_SIZE": (
        "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE",
    ),
}  # fmt: skip
_POSITIVE = ("MASTER_PORT", "OMP_NUM_THREADS", "SLURM_CPUS_PER_TASK")


@dataclass(frozen=True)
class ZeroConfig:
    """The stage of ZeRO, and what is offloaded to the host's memory."""

    stage: int
    offload_optimizer: bool = False
    offload_weights: bool = False

    def __str__(self) -> str:
        """Return its name for messages and logs."""
        where = [name for name in ("optimizer", "weights") if getattr(self, f"offload_{name}")]
        return f"DeepSpeed ZeRO-{self.stage}" + f", {' and '.join(where)} on the CPU" * bool(where)


@dataclass(frozen=True)
class Launch:
    """The number of processes and the engine that the launcher requests."""

    processes: int
    zero: ZeroConfig | None

    def __str__(self) -> str:
        """Return its name for messages and logs."""
        if self.zero is None and self.processes == 1:
            return "one process"
        return f"{self.zero or 'DDP'} on {self.processes} process" + "es" * (self.processes > 1)


def read_variables() -> None:
    """Validate launchers' variables, unset empty ones, and set torch's from MPI's.

    Raise UserError naming a variable that is not a number, or contradicts the others.
    """
    for ours, others in _NUMBERS.items():
        for name in (ours, *others):
            _number(name, 1 if name.endswith("SIZE") or name.endswith("NRANKS") else 0)
    for name in _POSITIVE:
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


def _number(name: str, minimum: int) -> int | None:
    text = os.environ.get(name)
    if text is None:
        return None
    if not text.strip():
        del os.environ[name]  # some launchers set it empty; libraries would parse it as a number
        return None
    if not text.strip().isdecimal() or int(text) < minimum:
        raise UserError(
            f"{name} is {text!r}: set it to a whole number of {minimum} or more, or unset it"
        )
    return int(text)


def _adopt_mpi() -> None:
    """Set torch's variables from those of mpirun; on a single machine the address too."""
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


def read_launch(precision: str) -> Launch:
    """Return the engine that the launcher requests; raise UserError if it is not supported.

    The launcher may not request another `precision` than the run's.
    """
    # `accelerate launch --cpu --num_processes N` silently starts a single process.
    cpu_with_address = "MASTER_ADDR" in os.environ and _variable("ACCELERATE_USE_CPU") == "true"
    if cpu_with_address and not os.environ.keys() & {"RANK", "PMI_RANK", "PMI_SIZE"}:
        raise UserError(
            "accelerate launch started one process though --num_processes is larger: "
            "write --multi_gpu instead of --cpu, which works on CPUs too"
        )
    for variable, name in _UNSUPPORTED.items():
        if _variable(variable) == "true":
            raise UserError(
                f"accelerate launch requests {name}, which the trainers do not support: choose "
                "distributed_type NO, MULTI_GPU or DEEPSPEED"
            )
    _check_agreement(precision)
    zero = _read_zero() if _variable(_USES_DEEPSPEED) == "true" else None
    return Launch(int(os.environ.get("WORLD_SIZE", "1")), zero)


def count_nodes() -> int:
    """Return the number of machines; each has equally many processes."""
    processes, local = (int(os.environ.get(n, "1")) for n in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    # Processes that are started by hand may lack LOCAL_WORLD_SIZE.
    return processes // local if "LOCAL_WORLD_SIZE" in os.environ and local > 0 else 1


def _check_agreement(precision: str) -> None:
    """Raise UserError where the launcher would override the run's configuration."""
    asked = _variable("ACCELERATE_MIXED_PRECISION")
    if asked not in ("", "no", precision):
        raise UserError(
            f"accelerate launch requests mixed_precision {asked}, but the run has {precision}: "
            "leave it to train.mixed_precision"
        )
    if _variable("ACCELERATE_DYNAMO_BACKEND") not in ("", "no"):
        raise UserError("accelerate launch requests dynamo_backend: leave it to train.compile")
    for (name, key), neutral in zip(_ONLY_DEEPSPEED.items(), ("1", "none"), strict=True):
        asked = _variable(f"ACCELERATE_{name.upper()}") or _option_of_launcher(name)
        if asked not in ("", "auto", neutral):
            raise UserError(f"accelerate launch requests {name} {asked}: leave it to {key}")


def _option_of_launcher(name: str) -> str:
    """Return the value of an option on the launcher's command line, '' if it is not there.

    `accelerate launch` exports these options for DeepSpeed only and silently drops them otherwise.
    This process is its child, so its command line can still be read.
    """
    if "ACCELERATE_DYNAMO_BACKEND" not in os.environ:  # accelerate always sets it
        return ""
    try:
        words = psutil.Process().parent().cmdline()
    except (psutil.Error, AttributeError, OSError):
        return ""
    first = next((k for k, word in enumerate(words) if "accelerate" in Path(word).name), None)
    if first is None:
        return ""
    script = Path(sys.argv[0]).name  # options after it are the script's
    found = ""
    for word, following in itertools.pairwise([*words[first + 1 :], ""]):
        if Path(word).name == script:
            break
        option, equals, value = word.partition("=")
        if option.removeprefix("--").replace("-", "_") == name:  # accelerate takes both spellings
            found = value if equals else following
    return found


def _read_zero() -> ZeroConfig:
    file = _variable("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if file not in ("", "none"):
        raise UserError(
            f"deepspeed_config_file is {file}: the trainers make DeepSpeed's configuration "
            "themselves; give zero_stage and offload_*_device in the accelerate config instead"
        )
    stage = _variable("ACCELERATE_DEEPSPEED_ZERO_STAGE") or "2"  # accelerate's default
    if stage not in ("0", "1", "2", "3"):
        raise UserError(f"zero_stage is {stage}: choose 0, 1, 2 or 3")
    zero = ZeroConfig(int(stage), _on_cpu("optimizer"), _on_cpu("param"))
    if (zero.offload_weights and zero.stage < 3) or (zero.offload_optimizer and zero.stage < 1):
        raise UserError(
            f"accelerate launch requests {zero}: the optimizer can be offloaded in stages 1 to 3, "
            "weights only in stage 3"
        )
    return zero


def _on_cpu(what: str) -> bool:
    device = _variable(f"ACCELERATE_DEEPSPEED_OFFLOAD_{what.upper()}_DEVICE") or "none"
    if device not in ("none", "cpu"):
        raise UserError(f"offload_{what}_device is {device}: choose none or cpu")
    return device == "cpu"


def _variable(name: str) -> str:
    return os.environ.get(name, "").lower()


@contextlib.contextmanager
def without_deepspeed_plugin() -> Iterator[None]:
    """Hide DeepSpeed from accelerate, whose plugin supports one net only."""
    asked = os.environ.pop(_USES_DEEPSPEED, None)
    try:
        yield
    finally:
        if asked is not None:
            os.environ[_USES_DEEPSPEED] = asked


def on_gpu() -> bool:
    """Return whether a GPU is used: there is one, and accelerate is not configured for CPUs."""
    given = os.environ.get("ACCELERATE_USE_CPU", "").lower()
    return torch.cuda.is_available() and given not in ("1", "true", "t", "yes", "y", "on")
