"""The benchmark of whole training steps, on the smallest sizes."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from torch.autograd import DeviceType

from dgm.benchmarks import contestants, loops, peer_loops, step
from dgm.benchmarks.contestants import LoopError, Race, run_race
from dgm.benchmarks.profiling import time_by_name
from dgm.common.errors import UserError
from dgm.diffusion.unet import UNet, UNetConfig
from dgm.nn.compiling import compile_net

SMALL = ["--channels", "16", "--batch", "2", "--rounds", "1", "--steps", "1"]
SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "benchmark.py"


@pytest.mark.slow
@pytest.mark.long
def test_ladder_trains_the_same_on_every_rung(
    run_script: Callable, tiny_shards: Path, tmp_path: Path
):
    out, png = tmp_path / "step.json", tmp_path / "step.png"
    small = ["model.channel_mult=[1]", "model.num_blocks=[1]", "model.attention_at=[]"]
    small += ["model.channels=32"]  # the fewest that all kernels take; three rungs compile the net
    done = run_script(
        SCRIPT, "step", "--ladder", *SMALL, "--shards", tiny_shards, "--json", out, "--png", png,
        "--options", *small, timeout=400,
    )  # fmt: skip
    assert done.code == 0, done.stderr
    found = json.loads(out.read_text())["step"]
    assert list(found["loops"]) == [
        "eager, NCHW, fp32",
        "channels_last",
        "fused noise",
        "compiled net",
        "our kernels",
        "fused optimizer and EMA",
    ]
    for name, loop in found["loops"].items():
        assert len(loop["images_per_s"]) == 1 and len(loop["losses"]) >= 4, name
        assert loop["loss_apart"] < 1e-4, name  # the same draws; a few steps of rounding
    parts = found["parts"]
    assert 0 < parts["forward_backward_s"] < parts["step_s"]
    assert parts["convolutions_s"] > 0 and parts["convolutions_alone_s"] > 0
    assert found["profile"]["conversions"] == 0 and found["profile"]["synchronisations"] is None
    assert png.stat().st_size > 1000


def test_sizes_that_make_no_sense_are_named(run_warm: Callable):
    done = run_warm(SCRIPT, "step", "--batch", 0)
    assert done.code == 2 and done.stderr == "error: --batch is 0: choose 1 to 65536\n"


def test_missing_peers_are_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match=r"diffusers is not installed: pip install -e '.\[peers\]'"):
        peer_loops.check_installed()


@pytest.mark.slow
def test_an_option_that_the_trainer_does_not_know_is_named(run_script: Callable, tiny_shards: Path):
    words = [*SMALL, "--shards", tiny_shards, "--options", "train.nonsense=1"]
    done = run_script(SCRIPT, "step", *words)
    assert done.code == 2, done.stderr
    assert done.stderr.startswith("error: ") and "train.nonsense" in done.stderr
    assert done.stderr.count("\n") == 1


def test_there_are_pictures_for_whole_batches():
    assert step.num_pictures(32, 23) == 1984  # an epoch is many steps, all of them whole
    assert step.num_pictures(512, 63) == 63 * 512  # none ends within a turn
    assert step.num_pictures(512, 10_000) == 97 * 512
    assert step.num_pictures(65_536, 10) == 65_536  # one batch at least, which a loader may drop


def test_pictures_repeat_where_a_batch_is_larger_than_the_data(tiny_shards: Path, tmp_path: Path):
    step._write_pictures(str(tiny_shards), tmp_path / "pictures", 700)
    written = sorted((tmp_path / "pictures" / "all").iterdir())
    assert len(written) == 700
    assert written[0].read_bytes() == written[320].read_bytes() == written[640].read_bytes()
    assert written[0].read_bytes() != written[1].read_bytes()


def test_a_batch_too_small_for_a_peer_is_named():
    with pytest.raises(UserError, match="--batch is 8: choose 16 or more for --peers"):
        peer_loops.check_batch(8)


LOOP = """
import json, os, subprocess, sys, time
asked = json.loads(sys.argv[1])
kind = asked["kind"]
if kind == "mistaken":
    print("error: model.channels is 3: choose 8", file=sys.stderr)
    sys.exit(2)
alive = open(asked["alive"], "a")
print(os.getpid(), file=alive, flush=True)
if kind == "hangs":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print(child.pid, file=alive, flush=True)
    time.sleep(600)
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    if kind == "dies" and request.get("go"):
        print("CUDA out of memory", file=sys.stderr)
        sys.exit(1)
    print(json.dumps({"seconds": 0.5, "asked": request, "at": time.monotonic()}), flush=True)
"""


@pytest.fixture
def race(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict]:
    """Return what lets loops of some kinds race; none of their processes may be left."""
    loop = tmp_path / "loop.py"
    loop.write_text(LOOP)
    # The interpreter gets `-m dgm.benchmarks.loops JSON`; here a script that takes the last.
    shell = tmp_path / "python"
    shell.write_text(f'#!/bin/sh\nexec {sys.executable} {loop} "$3"\n')
    shell.chmod(0o755)

    def run(*kinds: str, seconds: float = math.inf, one_by_one: bool = False):
        monkeypatch.setattr(contestants, "sys", SimpleNamespace(executable=str(shell)))
        alive = tmp_path / "alive.txt"
        alive.touch()
        own = tmp_path / f"race-{one_by_one}"
        own.mkdir()
        wanted = {kind: {"kind": kind, "alive": str(alive)} for kind in kinds}
        deadline = time.monotonic() + seconds
        settings = Race(2, 3, 5, deadline, one_by_one, kinds[0], with_parts=True)
        try:
            found = run_race(wanted, settings, own)
        finally:
            left = [int(pid) for pid in alive.read_text().split() if psutil.pid_exists(int(pid))]
            running = [p for p in map(psutil.Process, left) if p.status() != "zombie"]
            assert not running
        return found

    return run


def test_a_loop_that_fails_leaves_the_others_their_figures(race: Callable):
    for one_by_one in (False, True):
        found = race("works", "dies", "well", one_by_one=one_by_one)
        loops = found["loops"]
        assert list(loops) == ["works", "dies", "well"]
        assert loops["works"]["images_per_s"] == loops["well"]["images_per_s"] == [30.0, 30.0]
        assert loops["dies"]["failed"] == "ended with code 1: CUDA out of memory"
        assert found["profile"]["asked"] == {"profile": 3}
        assert dict(contestants.failed(loops)) == {"dies": loops["dies"]["failed"]}


def test_time_counts_from_the_start_of_the_process():
    began = time.time() - psutil.Process().create_time()
    left = step._deadline(1000.0) - time.monotonic()
    assert 0 <= 1000 - began - left < 1
    assert step._deadline(None) == math.inf


@pytest.mark.slow
def test_time_is_for_all_loops_and_none_outlives_it(race: Callable):
    start = time.monotonic()
    found = race("works", "hangs", seconds=10, one_by_one=True)
    assert 9 < time.monotonic() - start < 40
    assert found["loops"]["works"]["images_per_s"] == [30.0, 30.0]
    assert found["loops"]["hangs"]["failed"] == "the time was over"


def test_mistakes_and_failures_of_all_are_told(race: Callable):
    with pytest.raises(UserError, match=r"model\.channels is 3: choose 8"):
        race("mistaken", "works")
    with pytest.raises(LoopError, match="the loop dies: ended with code 1: CUDA out of memory"):
        race("dies", one_by_one=True)


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
    expected = loops.gflop(net, torch.device("cpu"))
    compile_net(net)
    torch._dynamo.utils.counters.clear()
    assert loops.gflop(net, torch.device("cpu")) == expected > 0
    assert not torch._dynamo.utils.counters["stats"]
