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
NETS = ("64:128", "32:128", "16:384", "4:256")
"""Sizes and channels of nets that need every kind of tile: several of an image, the largest, those
with groups of 12 and 24 channels, and the smallest."""

pytest.importorskip("triton")


def compile_for_gpu(cache: Path, *nets: str) -> list[dict[str, Any]]:
    """Compile in a process of its own, since this one interprets kernels."""
    env = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(HERE / "compile_for_gpu.py"), "90"]
    command += ["--dropout", "0.1", "--nets", *nets]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    kernels: list[dict[str, Any]] = json.loads(done.stdout)["kernels"]
    return kernels


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Return a cache and the kernels compiled into it."""
    cache = tmp_path_factory.mktemp("cache")
    return cache, compile_for_gpu(cache, *NETS)


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
    # A net has three kinds of norms; no purpose of a draw or address of a tensor makes another.
    assert len([kernel for kernel in kernels if kernel["kernel"] != "noise"]) <= 6 * len(NETS)


@pytest.mark.slow
def test_cached_kernels_are_not_compiled_again(compiled: tuple[Path, list[dict[str, Any]]]):
    cache, kernels = compiled
    files = sorted(cache.rglob("*.cubin"))
    again = compile_for_gpu(cache, NETS[0])
    assert all(kernel in kernels for kernel in again) and len(again) > 5
    assert sorted(cache.rglob("*.cubin")) == files and len(files) == len(kernels)
