"""Compile every Triton kernel of a training step of DDPM's U-Net for a GPU that is not present.

`TRITON_CACHE_DIR=DIR python tests/kernels/compile_for_gpu.py 90` fills a cache which that GPU's
machine can use, if it has the same version of Triton, and prints each kernel's resources as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from dgm.diffusion.config import DiffusionConfig, DiffusionSampleConfig
from dgm.diffusion.objective import DiffusionObjective
from dgm.diffusion.unet import UNet, UNetConfig
from dgm.nn.kernels import precompile
from dgm.nn.layers import NormAct
from dgm.objective import Batch
from dgm.rng import Draws

CLASSES = 10
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class AbsentGpu:
    """Stands in for Triton's GPU driver, with only what compiling for a GPU needs."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_device_interface(self) -> Any:
        return torch.cuda


def collect(config: UNetConfig, size: int) -> precompile.Launches:
    """Collect the launches of a step in bf16 on images of a size, as a GPU would make them."""
    net = UNet(config, size, num_classes=CLASSES)
    for module in net.modules():
        if isinstance(module, NormAct):
            module.kernels = "triton"
    objective = DiffusionObjective(
        DiffusionConfig(), DiffusionSampleConfig(), (size, size, 3), CLASSES, backend="kernel"
    )
    index = torch.arange(1)
    batch = Batch(torch.zeros(1, size, size, 3, dtype=torch.uint8), index)
    net = net.to(memory_format=torch.channels_last)
    with precompile.collect() as launches, torch.autocast("cpu", torch.bfloat16):
        objective.loss({"net": net}, batch, objective.phases[0], Draws.of(0, index, index))
    return launches


def used(binary: bytes) -> dict[str, Any]:
    """Return the registers and spilled bytes per thread, and the number of instructions."""
    with tempfile.TemporaryDirectory() as folder:
        (file := Path(folder) / "kernel.cubin").write_bytes(binary)

        def run(tool: str, *options: str) -> str:
            command = [str(TOOLS / tool), *options, str(file)]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage = run("cuobjdump", "--dump-resource-usage")
        code = run("nvdisasm")
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?!NOP)(?=[@A-Z])", code, re.MULTILINE)
    return {
        "registers": found["REG"],
        "spilled_bytes": found["STACK"] + found["LOCAL"],
        "instructions": len(instructions),
    }


def describe(kernel: Any, options: dict[str, Any], asm: dict[str, Any]) -> dict[str, Any]:
    """Return the name, options and resources of a compiled kernel."""
    flags = [name for name, value in options.items() if value is True]
    elements = 8 * options["ROWS"] * options["CHANNELS"] if "ROWS" in options else None
    found = used(asm["cubin"])
    threads = 32 * options["num_warps"]
    return {
        "kernel": kernel.__name__,
        "tile": {k: options[k] for k in ("ROWS", "CHANNELS", "GROUP") if k in options},
        "flags": flags,
        "warps": options["num_warps"],
        **found,
        "instructions_per_element": elements and found["instructions"] * threads / elements,
        "wide_loads": bool(re.search(r"ld\.global\S*\.v[24]|ld\.global\S*\.b64", asm["ptx"])),
    }


def main() -> None:
    """Compile all, and print what they use."""
    parser = argparse.ArgumentParser()
    parser.add_argument("capability", type=int)
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.0, 0.1])
    parser.add_argument("--nets", nargs="+", help="SIZE:CHANNELS of one-level nets, not DDPM's")
    parser.add_argument("--workers", type=int)
    args = parser.parse_args()
    driver.set_active(AbsentGpu(args.capability))
    kinds: dict[Any, Any] = {}
    for dropout in args.dropout:
        ddpm = UNetConfig(dropout=dropout)
        one_level = replace(ddpm, channel_mult=[1], num_blocks=[1], attention_at=[])
        for size, channels in (map(int, net.split(":")) for net in args.nets or ()):
            kinds |= collect(replace(one_level, channels=channels), size).kinds
        if args.nets is None:
            kinds |= collect(ddpm, 32).kinds
    launches = precompile.Launches()
    launches.kinds = kinds
    start, before = time.perf_counter(), _processor_s()
    launches.compile(args.workers)
    seconds = {"seconds": time.perf_counter() - start, "processor_s": _processor_s() - before}
    kernels = []
    seen = set()
    for kernel, given, options in kinds.values():
        made = kernel.warmup(*given, grid=(1,), **options)  # from memory
        if made.hash not in seen:
            seen.add(made.hash)
            kernels.append(describe(kernel, options, made.asm))
    print(json.dumps({"triton": triton.__version__, **seconds, "kernels": kernels}, indent=1))


def _processor_s() -> float:
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(sum(resource.getrusage(kind)[:2]) for kind in kinds)


if __name__ == "__main__":
    main()
