"""The benchmarks of sampling, noising, growing data and several processes."""

from __future__ import annotations

import argparse
import json
import sys
import time
import types
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dgm.benchmarks import machine, noise, sample
from dgm.benchmarks.scaling import model

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "benchmark.py"


class FakePipeline:
    """diffusers' DDIMPipeline with its types: it returns numpy arrays."""

    def __init__(self, net: nn.Module, scheduler: object):
        self.net = net

    def set_progress_bar_config(self, disable: bool) -> None:
        assert disable

    @torch.no_grad()
    def __call__(self, count: int, generator: torch.Generator, **options: object) -> np.ndarray:
        weight = next(self.net.parameters())
        x = torch.randn(count, 3, 8, 8, generator=generator, dtype=weight.dtype)
        x = x - 0.1 * self.net(x)
        return x.cpu().permute(0, 2, 3, 1).numpy()


@pytest.mark.slow
def test_sampling_in_bf16_has_peers(monkeypatch: pytest.MonkeyPatch):
    fake = types.ModuleType("diffusers")
    fake.DDIMPipeline = FakePipeline  # type: ignore[attr-defined]
    fake.DDIMScheduler = lambda **options: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "diffusers", fake)
    monkeypatch.setattr(sample, "check_installed", lambda: None)
    monkeypatch.setattr(sample, "diffusers_net", lambda width: nn.Conv2d(3, 3, 3, padding=1))
    found = sample.measure(sampling(precision="bf16", peers=True))
    assert found["images_per_s"]["diffusers.DDIMPipeline"][0] > 0 and not found["failed"]
    assert found["ratio"] > 0


@pytest.mark.slow
def test_a_sampler_that_fails_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch):
    def broken(args: argparse.Namespace, classes: bool, **options: object):
        if not classes:
            error = RuntimeError("CUDA out of memory\nmore")
            return lambda seed: (_ for _ in ()).throw(error)
        return ours(args, classes, **options)

    ours = sample._ours
    monkeypatch.setattr(sample, "_ours", broken)
    found = sample.measure(sampling())
    assert found["failed"] == {"ours": "CUDA out of memory"}
    assert all(rates[0] > 0 for rates in found["images_per_s"].values())
    assert len(found["images_per_s"]) == 2


def sampling(**given: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    sample.add_arguments(parser)
    small = ["--channels", "16", "--batch", "2", "--steps", "1", "--repetitions", "1"]
    args = parser.parse_args(small)
    vars(args).update(given)
    return args


@pytest.mark.slow
def test_noising_counts_bytes_by_type(capsys: pytest.CaptureFixture[str]):
    args = argparse.Namespace(batch=4, repetitions=2, precision="no")
    with torch.compiler.set_stance("force_eager"):
        found = noise.measure(args)
    assert found["gb_per_s"] > 0 and found["copy_gb_per_s"] > 0 and found["batch"] == 4
    # Stored bytes, three images in fp32; labels read, and t, label, alpha and sigma written.
    assert found["moved_bytes"] == 4 * (32 * 32 * 3 * (1 + 3 * 4) + 8 + 2 * 8 + 2 * 4)
    assert all(len(times) == 5 for times in found["ms_per_batch"].values())
    assert "batch 4: " in capsys.readouterr().out
    inputs = noise.make_inputs(4, 0)
    images = torch.zeros(4, 3, 32, 32, dtype=torch.bfloat16)
    half = noise.moved_bytes(inputs, noise.NoisedImages(images, images, images))
    assert half == 4 * (32 * 32 * 3 * (1 + 3 * 2) + 8)


@pytest.mark.slow
def test_growing_data_links_the_same_bytes(run_script: Callable, tiny_shards: Path, tmp_path: Path):
    out = tmp_path / "growth.json"
    done = run_script(
        SCRIPT, "growth", "--shards", tiny_shards, "--images", 300, 100_000, "--steps", 20,
        "--batch", 32, "--repetitions", 1, "--json", out,
    )  # fmt: skip
    assert done.code == 0, done.stderr
    found = json.loads(out.read_text())["growth"]
    assert list(found["us_per_image"]) == ["320 images", "100,020 images"]
    assert found["last_over_first"]["private_mib"] < 1.1
    assert not list(tiny_shards.parent.glob("growth-*"))


@pytest.mark.slow
@pytest.mark.long
def test_two_processes_send_each_gradient_once(
    run_script: Callable, tiny_shards: Path, tmp_path: Path
):
    out = tmp_path / "scaling.json"
    done = run_script(
        SCRIPT, "scaling", "--shards", tiny_shards, "--channels", 16, "--batch", 2, "--rounds", 1,
        "--steps", 1, "--json", out, timeout=300, variables={"TORCHDYNAMO_DISABLE": "1"},
    )  # fmt: skip
    assert done.code == 0, done.stderr
    found = json.loads(out.read_text())["scaling"]
    # Each of two processes in a ring sends one gradient; parallel tests may use the loopback too.
    assert found["sent_bytes"] > 0.95 * found["gradient_bytes"]
    assert found["step_s"] > 0 and found["average_s"] > 0 and 0 <= found["hidden"] <= 1


def test_model_hides_sending_behind_two_thirds_of_the_step():
    eight, _, most = model(120e6, 1e-4, [300, 40, 40])
    assert eight["sending_ms"] == pytest.approx(2 * 7 / 8 * 120e6 / 300e9 * 1e3)
    assert most["batch_that_hides"] == pytest.approx(2 * 511 / 512 * 120e6 / 40e9 / (2e-4 / 3))


def test_calls_are_timed_together_on_inputs_in_turn():
    seen: list[int] = []
    made: list[weakref.ref[torch.Tensor]] = []

    def work(given: int) -> torch.Tensor:
        seen.append(given)
        # As many results as there are inputs are kept, so that none is written over another.
        assert sum(ref() is not None for ref in made) == min(len(made), 3)
        time.sleep(0.01)
        result = torch.zeros(1)
        made.append(weakref.ref(result))
        return result

    seconds = machine.time_calls(work, [1, 2, 3], 6)
    assert seen == [1, 2, 3, 1, 2, 3]
    assert 0.01 <= seconds < 0.02
