"""Whether a GPU can be used, and which it is: `python -m tests.gpu.machine` prints JSON."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import shutil
import subprocess
import sys
import warnings
from typing import Any

import torch

from dgm.common.command_line import run_command
from dgm.common.errors import UserError

DRY_RUN = "add --dry-run for small sizes on the CPU"
PACKAGES = ("triton", "numpy", "accelerate", "diffusers", "denoising-diffusion-pytorch")


def check_gpu() -> None:
    """Raise UserError if torch cannot use a GPU, or it has no bf16."""
    if torch.version.cuda is None:
        raise UserError(
            f"torch {torch.__version__} was built without CUDA: install a build with it, or "
            f"{DRY_RUN}"
        )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if not available:
        # torch warns of a driver that is too old, with its version.
        found = [driver(), *(" ".join(str(each.message).split())[:300] for each in caught)]
        reason = "there is no GPU here: run this on a machine with one"
        if any(found):
            reason = (
                f"torch {torch.__version__}, which needs CUDA {torch.version.cuda}, finds no GPU "
                f"({'; '.join(filter(None, found))}): update the driver, check CUDA_VISIBLE_DEVICES"
            )
        raise UserError(f"{reason}, or {DRY_RUN}")
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        major, minor = torch.cuda.get_device_capability()
        raise UserError(
            f"the GPU {torch.cuda.get_device_name()} has compute capability {major}.{minor} and no "
            f"bf16: use one of 8.0 or higher, or {DRY_RUN}"
        )


def driver() -> str | None:
    """Return name and driver of the GPUs that nvidia-smi shows; None if it shows none."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return "; ".join(done.stdout.strip().replace(", ", " with driver ").splitlines()) or None


def describe() -> dict[str, Any]:
    """Return versions of Python, packages and drivers, and properties of the GPU."""
    found: dict[str, Any] = {"python": sys.version.split()[0], "torch": torch.__version__}
    for name in PACKAGES:
        found[name] = None
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": card.name,
            "capability": f"{card.major}.{card.minor}",
            "memory_gib": round(card.total_memory / 2**30, 1),
            "multiprocessors": card.multi_processor_count,
            "cache_mib": card.L2_cache_size / 2**20,
            "driver": driver(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return found


def main() -> None:
    """Print the description as JSON; `--dry-run` needs no GPU."""
    if "--dry-run" not in sys.argv[1:]:
        check_gpu()
    print(json.dumps(describe()))


if __name__ == "__main__":
    run_command(main)
