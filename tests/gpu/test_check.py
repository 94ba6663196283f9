"""Checks of a GPU: each has its time, and one that hangs or dies does not stop the others."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dgm.benchmarks.processes import ROOT
from dgm.diffusion import forward_process
from dgm.nn.kernels import norm_gpu
from dgm.training.optimizer import AdamW
from tests.gpu import check
from tests.gpu.checks import registry
from tests.gpu.checks.kernels import launches
from tests.gpu.checks.registry import Context

CHECKS = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
from tests.gpu import check
from tests.gpu.checks.registry import Group

group = check.GROUPS["kernels"] = Group()

@group.check("right", quick=True)
def right(context):
    return "all well"

@group.check("wrong", quick=True)
def wrong(context):
    raise AssertionError("one is not two")

@group.check("hangs", 1, quick=True)
def hangs(context):
    time.sleep(600)

@group.check("dies", quick=True)
def dies(context):
    print("out of memory", flush=True)
    os._exit(3)

@group.check("needs a GPU", quick=True, needs_gpu=True)
def on_a_gpu(context):
    raise AssertionError("called without a GPU")

@group.check("not quick")
def long(context):
    raise AssertionError("chosen")

sys.exit(check.main())
"""


def run_checks(script: object, *words: object, timeout: float) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, (script, *words))]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


@pytest.mark.slow
def test_checks_that_hang_or_die_do_not_stop_the_others(tiny_shards: Path, tmp_path: Path):
    script, out = tmp_path / "checks.py", tmp_path / "out"
    script.write_text(CHECKS)
    words = ["--quick", "--groups", "kernels", "--seconds", 90]
    done = run_checks(script, out, tiny_shards, *words, timeout=100)
    assert done.returncode == 1 and "1 passed, 3 failed, 1 skipped" in done.stdout, done.stderr
    found = json.loads((out / "checks.json").read_text())
    assert {name: (each["state"], each["detail"]) for name, each in found.items()} == {
        "right": ("passed", "all well"),
        "wrong": ("failed", "AssertionError: one is not two"),
        "hangs": ("failed", "took more than 1 s"),
        "dies": ("failed", "its process ended with code 3: out of memory"),
        "needs a GPU": ("skipped", "needs a GPU"),
    }
    assert "one is not two" in found["wrong"]["trace"]


@pytest.mark.slow
def test_a_folder_without_shards_is_named(tmp_path: Path):
    done = run_checks(check.__file__, tmp_path / "out", tmp_path, timeout=100)
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    message = f"error: SHARDS is {tmp_path}, which holds no index.json: name train shards\n"
    assert done.stderr == message


@pytest.mark.slow
def test_every_normalization_of_the_large_net_is_checked():
    found = launches()
    assert len(set(found)) == len(found) > 10
    images = {launch.image for launch in found}
    assert {(128, 32, 32), (256, 16, 16), (256, 4, 4), (256, 8, 8)} <= images
    joined = {launch.channels for launch in found if launch.skip}
    assert joined == {256, 384, 512}
    assert all(launch.added for launch in found if launch.dropout)
    assert any(not launch.silu for launch in found), "the normalization of attention"


def other_purpose(name: str) -> Callable:
    return lambda right: lambda purpose: right(purpose.replace(name, "x"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "owner, name, make_fault, found",
    [
        (norm_gpu, "threshold_and_factor",
         lambda right: lambda drop: (right(drop)[0], 1.0001 * right(drop)[1]),
         ("norm kernel, forward and backward, against float64, fp32",)),
        (norm_gpu, "int32", lambda right: lambda number: 1,
         ("norm kernel, forward", "norm kernel drops")),
        (forward_process, "purpose_id", other_purpose("noise"), ("noise kernel",)),
        (forward_process, "purpose_id", other_purpose("flip"), ("noise kernel",)),
        (AdamW, "step", lambda right: lambda self, lr, skip: right(self, lr), ("AdamW",)),
        (torch, "_fused_adamw_",
         lambda right: lambda *given, **named: right(*given, **named | {"beta2": 0.998}),
         ("AdamW",)),
    ],
)  # fmt: skip
def test_faults_are_found(
    owner: Any, name: str, make_fault: Callable, found: tuple[str, ...], tiny_shards: Path,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    monkeypatch.setattr(owner, name, make_fault(getattr(owner, name)))
    context = Context(tiny_shards, tmp_path, gpu=False, quick=True)
    for each in check.GROUPS["kernels"].chosen(context):
        expected = "failed" if each.name.startswith(found) else "passed"
        if expected == "passed" and each.seconds > 60:
            continue  # it takes seconds in the interpreter, and does not use what is faulty
        assert registry.carry_out(each, context).state == expected, each.name
