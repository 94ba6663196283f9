"""Compiling, and going on where it cannot be done."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from dgm.compiling import compile_net

LAUNCH = Path(__file__).resolve().parents[1] / "launch"


def test_a_net_is_compiled_in_place():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    plain, keys = copy.deepcopy(net), list(net.state_dict())
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable:
        seen.append("compiled")
        return graph.forward

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda call, **_: _dynamo(call, backend))
        compile_net(net)
        x = torch.randn(5, 3)
        assert torch.equal(net(x), plain(x))
    assert seen == ["compiled"] and list(net.state_dict()) == keys
    assert torch.equal(copy.deepcopy(net)(x), plain(x)) and seen == ["compiled"]


def _dynamo(call: Callable, backend: Callable) -> Callable:
    return torch._dynamo.optimize(backend)(call)


@pytest.mark.slow
def test_without_a_compiler_a_run_says_so_once_and_goes_on(
    run_script: Callable, tiny_shards: Path, tmp_path: Path
):
    missing = {"CXX": "/no/such/compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = run_script(
        LAUNCH / "train_ddpm.py", "--config", LAUNCH / "configs" / "ddpm_tiny.yaml",
        "--data.shards", tiny_shards, "--run.dir", tmp_path / "run", "--train.compile", "all",
        variables=missing,
    )  # fmt: skip
    assert done.code == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if "runs uncompiled" in line]
    assert len([line for line in said if "UNet" in line]) == 1, done.stderr
    assert all(line.startswith("warning: ") for line in said)
