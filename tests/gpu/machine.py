"""What the GPU is, and what keeps it from being used: `python -m tests.gpu.machine` prints JSON."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import warnings
from typing import Any

import torch

from dgm.common.errors import UserError

DRY_RUN = "add --dry-run for small sizes on the CPU"


def check_gpu() -> None:
    """Raise UserError where torch cannot use a GPU here, or it has no bf16."""
    if torch.version.cuda is None:
        raise UserError(
            f"torch {torch.__version__} was built without CUDA: install a build with it, or "
            f"{DRY_RUN}"
        )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    warning = " ".join(str(each.message) for each in caught)
    if not available:
        raise UserError(_why_not(warning, driver()))
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        major, minor = torch.cuda.get_device_capability()
        raise UserError(
            f"the GPU {torch.cuda.get_device_name()} has compute capability {major}.{minor} and no "
            f"bf16: use one of 8.0 or higher, or {DRY_RUN}"
        )


def _why_not(warning: str, shown: str | None) -> str:
    """Explain why torch sees no GPU: by its warning, and by what nvidia-smi shows."""
    if "driver on your system is too old" in warning:
        found = re.search(r"found version (\d+)", warning)
        version = f"supports CUDA {_cuda(int(found[1]))}" if found else "is too old"
        return (
            f"the driver {version}, torch {torch.__version__} needs CUDA {torch.version.cuda}: "
            f"update the driver, install a torch for it, or {DRY_RUN}"
        )
    if shown is not None:
        reason = f" ({' '.join(warning.split())[:200]})" if warning else ""
        return (
            f"nvidia-smi shows {shown}, but torch {torch.__version__} for CUDA "
            f"{torch.version.cuda} sees no GPU{reason}: update the driver, check "
            f"CUDA_VISIBLE_DEVICES, or {DRY_RUN}"
        )
    return f"there is no GPU here: run this where there is one, or {DRY_RUN}"


def _cuda(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def driver() -> str | None:
    """Return name and driver of the GPUs that nvidia-smi shows, None where it shows none."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    return "; ".join(f"{' with driver '.join(line.split(', '))}" for line in lines) or None


def describe() -> dict[str, Any]:
    """Return versions, and what the GPU is."""
    names = ("triton", "numpy", "accelerate", "diffusers", "denoising-diffusion-pytorch")
    found: dict[str, Any] = {"python": sys.version.split()[0], "torch": torch.__version__}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
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


def main() -> int:
    """Print what there is as JSON; a mistake in one line and code 2. `--dry-run` needs no GPU."""
    try:
        if "--dry-run" not in sys.argv[1:]:
            check_gpu()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(describe()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
