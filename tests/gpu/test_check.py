"""Checks of a GPU: each has its time, and one that hangs or dies leaves the others theirs."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dgm.diffusion import forward_process
from dgm.nn.kernels import norm_gpu
from dgm.training.optimizer import AdamW
from tests.gpu import check
from tests.gpu.checks import registry
from tests.gpu.checks.kernels import launches
from tests.gpu.checks.registry import Context, Group, Report, Skipped


@pytest.fixture
def context(tiny_shards: Path, tmp_path: Path) -> Context:
    return Context(tiny_shards, tmp_path / "scratch", gpu=False, quick=True)


def test_results_are_kept_as_they_come(context: Context, tmp_path: Path):
    group, report = Group(), Report(tmp_path / "checks.json")

    @group.check("right", quick=True)
    def right(context: Context) -> str:
        return "all well"

    @group.check("wrong", quick=True)
    def wrong(context: Context) -> str:
        raise AssertionError("one is not two")

    @group.check("elsewhere", quick=True)
    def elsewhere(context: Context) -> str:
        raise Skipped("no such key")

    @group.check("on a GPU", quick=True, needs_gpu=True)
    def on_a_gpu(context: Context) -> str:
        raise AssertionError("it was not to be called")

    @group.check("long")
    def long(context: Context) -> str:
        raise AssertionError("it was not to be chosen")

    states = []
    for each in group.chosen(context):
        report.add(each.name, registry.carry_out(each, context))
        states.append([one["state"] for one in json.loads(report.path.read_text()).values()])
    assert states[-1] == ["passed", "failed", "skipped", "skipped"]
    assert [len(found) for found in states] == [1, 2, 3, 4]
    assert "one is not two" in report.found["wrong"]["detail"]
    assert "AssertionError" in report.found["wrong"]["trace"]


@pytest.mark.slow
def test_every_normalisation_of_the_large_net_is_checked():
    found = launches()
    assert len(set(found)) == len(found) > 10
    images = {launch.image for launch in found}
    assert {(128, 32, 32), (256, 16, 16), (256, 4, 4), (256, 8, 8)} <= images
    joined = {launch.channels for launch in found if launch.skip}
    assert joined == {256, 384, 512}
    assert all(launch.added for launch in found if launch.dropout)
    assert any(not launch.silu for launch in found), "that of attention"


@pytest.mark.slow
def test_a_check_that_hangs_is_ended_and_the_rest_go_on(
    context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # For this process one check, which takes seconds, has no time at all.
    group = Group()
    first, hangs, *rest = check.GROUPS["kernels"].checks
    group.checks = [first, dataclasses.replace(hangs, seconds=0.0), *rest]
    monkeypatch.setitem(check.GROUPS, "kernels", group)
    report = Report(tmp_path / "checks.json")
    check.supervise("kernels", context, report, time.monotonic() + 200)
    states = {name: found["state"] for name, found in report.found.items()}
    assert states.pop(hangs.name) == "failed"
    assert "took more than" in report.found[hangs.name]["detail"]
    assert len(states) == 1 + sum(each.quick for each in rest)
    assert set(states.values()) == {"passed"}


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(1200)  # it takes five minutes
def test_all_checks_pass_on_a_cpu(tiny_shards: Path, tmp_path: Path):
    words = [sys.executable, check.__file__, tmp_path / "out", tiny_shards, "--seconds", "1100"]
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, timeout=1150)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out" / "checks.json").read_text())
    skipped = {name for name, one in found.items() if one["state"] == "skipped"}
    assert skipped == {"no step waits for the GPU", "graphs are eager"}
    assert len(found) > 20 and done.stdout.startswith("no GPU: checked on the CPU")


@pytest.mark.slow
def test_shards_that_are_none_are_named(tmp_path: Path):
    words = [sys.executable, check.__file__, tmp_path / "out", tmp_path]
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    said = f"error: SHARDS is {tmp_path}, which holds no index.json: name train shards\n"
    assert done.stderr == said


def wrong_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    right = norm_gpu.threshold_and_factor
    monkeypatch.setattr(
        norm_gpu, "threshold_and_factor", lambda drop: (right(drop)[0], 1.0001 * right(drop)[1])
    )


def other_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm_gpu, "int32", lambda number: 1)


def other_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    right = forward_process.purpose_id
    monkeypatch.setattr(
        forward_process, "purpose_id", lambda purpose: right(purpose.replace("noise", "x"))
    )


def other_flips(monkeypatch: pytest.MonkeyPatch) -> None:
    right = forward_process.purpose_id
    monkeypatch.setattr(
        forward_process, "purpose_id", lambda purpose: right(purpose.replace("flip", "x"))
    )


def no_skipping(monkeypatch: pytest.MonkeyPatch) -> None:
    step = AdamW.step
    monkeypatch.setattr(AdamW, "step", lambda self, lr, skip: step(self, lr))


def other_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = torch._fused_adamw_
    monkeypatch.setattr(
        torch, "_fused_adamw_", lambda *given, **named: fused(*given, **named | {"beta2": 0.998})
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault, found",
    [
        (wrong_factor, {"norm kernel both ways against float64, fp32"}),
        (other_dropout, {"norm kernel both", "norm kernel drops"}),
        (other_noise, {"noise kernel"}),
        (other_flips, {"noise kernel"}),
        (no_skipping, {"AdamW"}),
        (other_moments, {"AdamW"}),
    ],
)
def test_faults_are_found(
    fault: Callable, found: set[str], context: Context, monkeypatch: pytest.MonkeyPatch
):
    fault(monkeypatch)
    for each in check.GROUPS["kernels"].chosen(context):
        expected = "failed" if each.name.startswith(tuple(found)) else "passed"
        if expected == "passed" and each.seconds > 60:
            continue  # seconds in the interpreter, and nothing to see
        assert registry.carry_out(each, context)["state"] == expected, each.name
