"""The kernels become machine code of an H100, on a machine without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent

pytest.importorskip("triton")


def compile_for_gpu(cache: Path, *options: str) -> dict[str, Any]:
    """Compile in a process of its own, since this one interprets kernels."""
    env = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(HERE / "compile_for_gpu.py"), "90", *options]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.slow
def test_kernels_of_a_training_step_compile_for_a_gpu_without_spilling(tmp_path: Path):
    kernels = compile_for_gpu(tmp_path, "--larger")["kernels"]
    assert {kernel["kernel"] for kernel in kernels} == {"noise", "forward", "backward"}
    several_tiles = [k for k in kernels if "ROWS" in k["tile"] and "WHOLE" not in k["flags"]]
    assert {kernel["kernel"] for kernel in several_tiles} == {"forward", "backward"}
    for kernel in kernels:
        # With 128 registers a thread, two programs of 8 warps run at once on a multiprocessor.
        assert kernel["registers"] <= 128 and kernel["spilled_bytes"] == 0, kernel
        small = kernel["tile"].get("ROWS", 8) < 8
        assert kernel["wide_loads"] or small, kernel
        if "WHOLE" in kernel["flags"] and not small:
            limit = 45 + 15 * ("DROP" in kernel["flags"])  # Philox takes 12 or more of them
            assert kernel["instructions_per_element"] < limit, kernel
    # The rest of the launches of a step are of these kinds: neither the purpose of a draw nor the
    # address of a tensor makes another.
    assert len(kernels) <= 55


@pytest.mark.slow
def test_what_is_in_the_cache_is_not_compiled_again(tmp_path: Path):
    compile_for_gpu(tmp_path, "--dropout", "0.1")
    files = sorted(tmp_path.rglob("*.cubin"))
    again = compile_for_gpu(tmp_path, "--dropout", "0.1")
    assert sorted(tmp_path.rglob("*.cubin")) == files and len(files) >= 30
    assert len(again["kernels"]) == len(files)
