"""The benchmark of whole training steps, on the smallest sizes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dgm.errors import UserError
from launch.benchmarks import peer_loops

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
