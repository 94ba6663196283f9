"""Compile each kernel for a GPU of the given capability; print what it uses as JSON."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dgm.kernels import noise_triton, norm_triton

BF16, FP32, INT64 = "*bf16", "*fp32", "*i64"
NORM = {
    **dict.fromkeys(("x", "added", "y", "grad", "dx"), BF16),
    **dict.fromkeys(("weight", "bias", "mean", "rstd", "sum_dz", "sum_dz_x_hat", "sum_du"), FP32),
    **dict.fromkeys(("key", "index", "step"), INT64),
    **dict.fromkeys(("segment", "channels", "groups", "threshold"), "i32"),
    **dict.fromkeys(("eps", "keep_factor"), "fp32"),
    "purpose": "i64",
}
NORM_CONSTANTS = {
    "GROUP": 4, "GROUP_P2": 4, "HELD": 16, "ROWS": 64, "HAS_ADDED": True, "HAS_SCALE": False,
    "SILU": True, "DROP": True, "STEP_EACH": True, "scale": None, "shift": None,
}  # fmt: skip
NOISE = {
    "images": "*u8",
    **dict.fromkeys(("labels", "key", "index", "step", "t", "told"), INT64),
    **dict.fromkeys(("alphas", "sigmas", "wanted"), FP32),
    "x_t": BF16,
    **dict.fromkeys(("num_timesteps", "nobody", "width", "count", "blocks"), "i32"),
    "label_drop": "fp32",
    **dict.fromkeys(
        ("for_flip", "for_timestep", "for_label_drop", "for_dequantize", "for_noise"), "i64"
    ),
}
NOISE_CONSTANTS = {
    "CHANNELS": 3, "BLOCK": 256, "STEP_EACH": True, "FLIP": True, "DEQUANTIZE": False,
    "PREDICTION": "eps", "KEEP_X_0": False, "x_0": None, "BIN_WIDTH": 1 / 127.5,
}  # fmt: skip
MULTIPLES_OF_16 = {"channels", "segment", "groups", "count", "blocks", "width"}


def compiled(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], warps: int, capability: int
) -> dict[str, Any]:
    """Compile one kernel as a launch of it would."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    aligned = {
        (at,): [["tt.divisibility", 16]]
        for at, name in enumerate(names)
        if signature[name][0] == "*" or name in MULTIPLES_OF_16
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    target = GPUTarget("cuda", capability, 32)
    made = triton.compile(source, target=target, options={"num_warps": warps}).asm
    used = resources(made["cubin"])
    return {
        "registers": used["REG"],
        "spilled_bytes": used["STACK"] + used["LOCAL"],
        "wide_loads": bool(re.search(r"ld\.global\S*\.v[24]|ld\.global\S*\.b64", made["ptx"])),
    }


def resources(binary: bytes) -> dict[str, int]:
    """Give what a thread of a kernel uses: registers, bytes of stack, ..."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        (file := Path(folder) / "kernel.cubin").write_bytes(binary)
        command = [str(tool), "--dump-resource-usage", str(file)]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}


def main() -> None:
    """Compile all."""
    capability = int(sys.argv[1])
    kernels = {
        "norm forward": (norm_triton.forward, NORM, NORM_CONSTANTS, 4),
        "norm backward": (norm_triton.backward, NORM, NORM_CONSTANTS, 4),
        "noise": (noise_triton.noise, NOISE, NOISE_CONSTANTS, 2),
    }
    found = {name: compiled(*what, capability) for name, what in kernels.items()}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
