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
OPTIONS = ("--dropout", "0.1", "--blocks", "1", "--larger")

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


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Return the cache and the kernels of a U-Net with one block per level, DDPM's otherwise."""
    cache = tmp_path_factory.mktemp("cache")
    return cache, compile_for_gpu(cache, *OPTIONS)["kernels"]


@pytest.mark.slow
def test_kernels_of_a_training_step_compile_for_a_gpu_without_spilling(
    compiled: tuple[Path, list[dict[str, Any]]],
):
    _, kernels = compiled
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
    # Neither the purpose of a draw nor the address of a tensor makes another kernel.
    assert len(kernels) <= 40


@pytest.mark.slow
def test_cached_kernels_are_not_compiled_again(compiled: tuple[Path, list[dict[str, Any]]]):
    cache, kernels = compiled
    files = sorted(cache.rglob("*.cubin"))
    assert compile_for_gpu(cache, *OPTIONS)["kernels"] == kernels
    assert sorted(cache.rglob("*.cubin")) == files and len(files) == len(kernels)
