"""Compiling, and falling back to eager mode."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from dgm.nn.compiling import compile_net, compiled

LAUNCH = Path(__file__).resolve().parents[1] / "launch"


class Net(nn.Module):
    """Two layers. Not a bare nn.Sequential: all of its code is torch's, which dynamo of torch 2.11
    does not compile."""

    def __init__(self) -> None:
        super().__init__()
        # Matrix products only, which need no code in C++.
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace the compiler's backend by one that runs the traced graph; return its runs."""
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable:
        seen.append("compiled")
        return graph.forward

    compile_ = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda call, **how: compile_(call, backend=backend, **how)
    )
    return seen


def test_a_net_is_compiled_in_place(compilations: list[str]):
    net = Net()
    plain, keys = copy.deepcopy(net), list(net.state_dict())
    compile_net(net)
    x = torch.randn(5, 3)
    assert torch.equal(net(x), plain(x))
    assert compilations == ["compiled"] and list(net.state_dict()) == keys
    assert torch.equal(copy.deepcopy(net)(x), plain(x)) and compilations == ["compiled"]


def test_a_compiled_net_runs_uncompiled_in_forward_mode_only(
    compilations: list[str], recwarn: pytest.WarningsRecorder
):
    net = Net()
    plain = copy.deepcopy(net)
    compile_net(net)
    x, move = torch.randn(2, 5, 3)
    expected = torch.func.jvp(plain, (x,), (move,))
    assert all(map(torch.equal, torch.func.jvp(net, (x,), (move,)), expected))
    with forward_ad.dual_level():
        moved = forward_ad.unpack_dual(net(forward_ad.make_dual(x, move)))
        assert torch.equal(moved.tangent, expected[1])
    assert not compilations
    net(x)
    assert compilations == ["compiled"]
    assert not [w for w in recwarn if "runs uncompiled" in str(w.message)]


@pytest.mark.slow
def test_a_backward_pass_that_cannot_be_compiled_warns_once_and_falls_back(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
):
    from torch._inductor import config
    from torch._inductor.graph import GraphLowering

    codegen, tried = GraphLowering.codegen, []

    def fail_backward(graph: GraphLowering) -> object:
        tried.append("backward" if graph.is_backward else "forward")
        if graph.is_backward:
            raise RuntimeError("no code for this backward pass")
        return codegen(graph)

    monkeypatch.setattr(GraphLowering, "codegen", fail_backward)
    net = Net()
    plain = copy.deepcopy(net)
    compile_net(net)
    with config.patch(force_disable_caches=True):
        for _ in range(3):
            x = torch.randn(5, 3)
            for forward in (net, plain):
                forward(x).square().sum().backward()
    assert tried == ["forward", "backward"]
    assert all(
        torch.equal(a.grad, b.grad)
        for a, b in zip(net.parameters(), plain.parameters(), strict=True)
    )
    warned = [str(w.message) for w in recwarn if "runs uncompiled" in str(w.message)]
    assert len(warned) == 1 and "RuntimeError: no code for" in warned[0]


def test_too_many_batch_sizes_fall_back_to_eager_mode(compilations: list[str]):
    with torch._dynamo.config.patch(recompile_limit=1):
        double = compiled(lambda x: 2 * x)
        assert torch.equal(double(torch.ones(2)), torch.full((2,), 2.0))
        with pytest.warns(UserWarning, match="runs uncompiled"):
            assert torch.equal(double(torch.ones(3)), torch.full((3,), 2.0))
    assert compilations == ["compiled"]


@pytest.mark.slow
def test_a_cache_that_cannot_be_written_is_named_with_its_variable(
    run_warm: Callable, tmp_path: Path
):
    cache = tmp_path / "locked"
    cache.mkdir(mode=0o555)
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, torch\nfrom torch._inductor import config\n"
        "from dgm.nn.compiling import compiled\nfrom dgm.nn.kernels import native\n"
        # Skip what takes seconds: precompiled headers, the test of vector code, a process pool.
        "config.cpp_cache_precompile_headers = config.cpp.vec_isa_ok = False\n"
        "config.compile_threads = 1\n"
        "def double(x): return 2 * x + 1\n"
        "assert compiled(double)(torch.ones(3)).tolist() == [3, 3, 3]\n"
        "len(sys.argv) < 2 and native.available()\n"
    )
    variables = {"TORCHINDUCTOR_CACHE_DIR": str(cache), "XDG_CACHE_HOME": str(cache)}
    words = [LAUNCH.parent / "tests" / "support" / "without_rights.py", script]
    done = run_warm(*words, variables=variables)
    assert done.code == 0, done.stderr
    assert f"double runs uncompiled: the compiler's cache {cache}" in done.stderr
    assert "set TORCHINDUCTOR_CACHE_DIR to another folder" in done.stderr
    assert f"the cache folder {cache}/dgm cannot be written" in done.stderr
    assert "or set XDG_CACHE_HOME to another" in done.stderr and "g++" not in done.stderr
    mended = {name: str(tmp_path / "new") for name in variables}  # as the message says
    again = run_warm(*words, "without kernels", variables=mended).stderr
    assert "runs uncompiled" not in again and "cannot be written" not in again


@pytest.mark.slow
def test_a_cache_that_torch_cannot_make_is_a_one_line_error(
    run_script: Callable, tiny_config: Path, tmp_path: Path
):
    words = [LAUNCH / "train_ddpm.py", "--config", tiny_config, "--run.dir", tmp_path / "run"]
    done = run_script(*words, variables={"TORCHINDUCTOR_CACHE_DIR": "/dev/null/cache"})
    assert done.code == 2, done.stderr
    assert done.stderr.startswith("error: /dev/null/cache: Not a directory: make that cache")
    assert done.stderr.count("\n") == 1 and "set TORCHINDUCTOR_CACHE_DIR to" in done.stderr


@pytest.mark.slow
def test_without_a_compiler_a_run_warns_once_and_continues(
    run_script: Callable, tiny_shards: Path, tmp_path: Path
):
    missing = {"CXX": "/no/such/compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    missing["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # a pool of processes takes seconds to start
    done = run_script(
        LAUNCH / "train_ddpm.py", "--config", LAUNCH / "configs" / "ddpm_tiny.yaml",
        "--data.shards", tiny_shards, "--run.dir", tmp_path / "run", "--train.compile", "all",
        "--train.total_images", "32", "--run.trackers=[]", "--model.channel_mult=[1]",
        "--model.num_blocks=[1]",
        variables=missing,
    )  # fmt: skip
    assert done.code == 0, done.stderr
    warned = [line for line in done.stderr.splitlines() if "runs uncompiled" in line]
    # Once for each function: both passes of the forward process, and the network.
    names = sorted(line.split()[1] for line in warned if line.startswith("warning: "))
    assert names == ["UNet", "draw_per_image", "noised_and_target"] and len(warned) == 3, (
        done.stderr
    )
