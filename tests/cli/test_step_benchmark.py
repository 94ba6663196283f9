"""The benchmark of whole training steps, on the smallest sizes."""

from __future__ import annotations

import json
import math
import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from torch.autograd import DeviceType

from dgm.benchmarks import loop_processes, machine, peer_loops, step
from dgm.benchmarks.loop_processes import LoopError, Plan, failures, time_loops
from dgm.benchmarks.loops import time_by_name
from dgm.common.errors import UserError
from dgm.diffusion.unet import UNet, UNetConfig
from dgm.nn.compiling import compile_net

SMALL_NET = ["model.channel_mult=[1]", "model.num_blocks=[1]", "model.attention_at=[]"]
RUNGS = """
import json, sys
import torch
from dgm.benchmarks.loops import Ours
from dgm.benchmarks.step import _rungs
settings, losses = json.loads(sys.argv[1]), {}
with torch.compiler.set_stance("force_eager"):
    for name, own in _rungs(settings["small"]).items():
        loop = Ours({**settings, **own, "folder": f"{settings['folder']}/{len(losses)}"})
        loop.train(3)
        losses[name] = [float(loss) for loss in loop.losses]
print(json.dumps(losses))
"""


@pytest.mark.slow
def test_every_rung_of_the_ladder_trains_the_same(
    run_warm: Callable, tiny_shards: Path, tmp_path: Path
):
    script = tmp_path / "rungs.py"
    script.write_text(RUNGS)
    settings = {
        "batch": 2, "channels": 32, "precision": "no", "shards": str(tiny_shards),
        "folder": str(tmp_path), "small": [f"--{option}" for option in SMALL_NET],
    }  # fmt: skip
    done = run_warm(script, json.dumps(settings))
    assert done.code == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert list(found) == [rung.name for rung in step.LADDER if not rung.only_on_gpu]
    for name, losses in found.items():  # the same draws, up to rounding
        assert losses == pytest.approx(found[step.LADDER[0].name], rel=1e-4), name


@pytest.mark.slow
def test_rungs_are_timed_and_compared(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    monkeypatch.setattr(step, "LADDER", [step.LADDER[0], step.LADDER[-1]])
    png = tmp_path / "step.png"
    words = ["--ladder", "--channels", "16", "--batch", "2", "--rounds", "1", "--steps", "1"]
    words += ["--shards", str(tiny_shards), "--png", str(png), "--options", *SMALL_NET]
    parser = ArgumentParser()
    step.add_arguments(parser)
    found = step.measure(parser.parse_args(words))
    assert list(found["loops"]) == [rung.name for rung in step.LADDER]
    for name, loop in found["loops"].items():
        assert len(loop["images_per_s"]) == 1 and len(loop["losses"]) >= 4, name
        assert loop["loss_apart"] < 1e-4, name
    parts = found["parts"]
    assert 0 < parts["forward_backward_s"] < parts["step_s"]
    assert parts["convolutions_s"] > 0 and parts["convolutions_alone_s"] > 0
    assert found["profile"]["conversions"] == 0 and found["profile"]["fractions"]
    assert png.stat().st_size > 1000 and "loss diff" in capsys.readouterr().out


def test_missing_peers_and_small_batches_are_named(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UserError, match="--batch is 8: choose 16 or more for --peers"):
        peer_loops.check_batch(8)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match=r"diffusers is not installed: pip install -e '.\[peers\]'"):
        peer_loops.check_installed()


def test_pictures_are_whole_batches_and_repeat_the_data(tiny_shards: Path, tmp_path: Path):
    assert step.num_pictures(32, 23) == 1984  # whole batches
    assert step.num_pictures(512, 63) == 63 * 512  # no epoch ends within a turn
    assert step.num_pictures(512, 10_000) == 97 * 512
    assert step.num_pictures(65_536, 10) == 65_536  # one batch at least
    step._write_pictures(str(tiny_shards), tmp_path / "pictures", 700)
    written = sorted((tmp_path / "pictures" / "all").iterdir())
    assert len(written) == 700
    assert written[0].read_bytes() == written[320].read_bytes() == written[640].read_bytes()
    assert written[0].read_bytes() != written[1].read_bytes()


LOOP = """
import json, os, subprocess, sys, time
config = json.loads(sys.argv[1])
kind = config["kind"]
if kind == "mistaken":
    print("error: model.channels is 3: choose 8", file=sys.stderr)
    sys.exit(2)
alive = open(config["alive"], "a")
print(os.getpid(), file=alive, flush=True)
if kind == "hangs":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print(child.pid, file=alive, flush=True)
    time.sleep(600)
for line in sys.stdin:
    request = json.loads(line)
    if kind == "dies" and request.get("train"):
        print("CUDA out of memory", file=sys.stderr)
        sys.exit(1)
    answer = {"profile": request} if "profile" in request else {"seconds": 0.5}
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture
def timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict]:
    """Return a function that times loops of some kinds and checks that no process is left."""
    loop = tmp_path / "loop.py"
    loop.write_text(LOOP)
    # The interpreter gets `-m dgm.benchmarks.loops JSON`; this stand-in passes on JSON only.
    shell = tmp_path / "python"
    shell.write_text(f'#!/bin/sh\nexec {sys.executable} {loop} "$3"\n')
    shell.chmod(0o755)

    def run(*kinds: str, seconds: float = math.inf, sequential: bool = False):
        monkeypatch.setattr(loop_processes.sys, "executable", str(shell))
        alive = tmp_path / "alive.txt"
        alive.touch()
        configs = {kind: {"kind": kind, "alive": str(alive)} for kind in kinds}
        plan = Plan(2, 3, 5, time.monotonic() + seconds, sequential, kinds[0])
        try:
            found = time_loops(configs, plan, tmp_path)
        finally:
            left = [int(pid) for pid in alive.read_text().split() if psutil.pid_exists(int(pid))]
            running = [p for p in map(psutil.Process, left) if p.status() != "zombie"]
            assert not running
        return found

    return run


@pytest.mark.parametrize("sequential", [False, True])
def test_a_loop_that_fails_does_not_stop_the_others(timed: Callable, sequential: bool):
    found = timed("works", "dies", "well", sequential=sequential)
    loops = found["loops"]
    assert list(loops) == ["works", "dies", "well"]
    assert loops["works"]["images_per_s"] == loops["well"]["images_per_s"] == [30.0, 30.0]
    assert loops["dies"]["failed"] == "ended with code 1: CUDA out of memory"
    assert found["profile"] == {"profile": 3}
    assert dict(failures(loops)) == {"dies": loops["dies"]["failed"]}


def test_time_counts_from_the_start_of_the_process():
    began = time.time() - psutil.Process().create_time()
    left = step._deadline(1000.0) - time.monotonic()
    assert 0 <= 1000 - began - left < 1
    assert step._deadline(None) == math.inf


@pytest.mark.slow
def test_the_time_limit_is_for_all_loops_and_ends_them(timed: Callable):
    start = time.monotonic()
    found = timed("works", "hangs", seconds=10, sequential=True)
    assert 9 < time.monotonic() - start < 40
    assert found["loops"]["works"]["images_per_s"] == [30.0, 30.0]
    assert found["loops"]["hangs"]["failed"] == "timed out"


def test_mistakes_and_failures_of_all_are_reported(timed: Callable):
    with pytest.raises(UserError, match=r"model\.channels is 3: choose 8"):
        timed("mistaken", "works")
    with pytest.raises(LoopError, match="the loop dies: ended with code 1: CUDA out of memory"):
        timed("dies", sequential=True)


def test_time_is_counted_once():
    def event(key: str, device: DeviceType, own: float, annotation: bool = False):
        return SimpleNamespace(
            key=key, device_type=device, is_user_annotation=annotation,
            self_device_time_total=own, self_cpu_time_total=own,
        )  # fmt: skip

    averages = [
        event("aten::mm", DeviceType.CPU, 70.0),  # its kernel's time, on a GPU
        event("gemm", DeviceType.CUDA, 70.0),
        event("gemm", DeviceType.CUDA, 10.0),
        event("step", DeviceType.CUDA, 90.0, annotation=True),
        event("step", DeviceType.CPU, 95.0, annotation=True),
    ]
    assert time_by_name(averages, on_gpu=True) == {"gemm": 80.0}
    assert time_by_name(averages, on_gpu=False) == {"aten::mm": 70.0}
    a = torch.randn(200, 200)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
        start = time.perf_counter()
        with torch.profiler.record_function("annotated"):
            for _ in range(20):
                a = torch.nn.functional.linear(a, a)
        whole = 1e6 * (time.perf_counter() - start)
    spent = time_by_name(trace.key_averages(), on_gpu=False)
    assert "annotated" not in spent and max(spent, key=lambda name: spent[name]) == "aten::mm"
    assert 0 < sum(spent.values()) <= whole


@pytest.mark.slow
def test_operations_of_a_compiled_net_are_counted_without_compiling_it_again():
    config = UNetConfig(channels=8, channel_mult=[1, 2], num_blocks=[1, 1], attention_at=[])
    net = UNet(config, 32)
    expected = machine.gflop(net, torch.device("cpu"))
    compile_net(net)
    torch._dynamo.utils.counters.clear()
    assert machine.gflop(net, torch.device("cpu")) == expected > 0
    assert not torch._dynamo.utils.counters["stats"]
