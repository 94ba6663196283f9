"""The benchmark of engines: it compares real runs, and detects differences."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from dgm.benchmarks import engines

BENCHMARK = Path(__file__).parents[2] / "launch" / "benchmark.py"


@pytest.mark.slow
@pytest.mark.long
def test_table_of_losses_and_of_killed_runs(
    run_script: Callable, tiny_shards: Path, tmp_path: Path
) -> None:
    words = ["--families", "vae", "--engines", "one", "ddp2", "--parts", "losses", "--steps", "12"]
    done = run_script(
        BENCHMARK, "engines", *words, "--shards", tiny_shards, "--json", tmp_path / "found.json"
    )
    assert done.code == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())["engines"]["losses"]["DDP on 2"]
    assert 0 < found["vae"] < 1e-5
    assert f"| DDP on 2 | {found['vae']:.1e} |" in done.stdout.splitlines()


@pytest.mark.slow
@pytest.mark.long
def test_killed_runs_are_compared_with_whole_ones(tiny_shards: Path, tmp_path: Path) -> None:
    runs = engines.Runs(tmp_path, str(tiny_shards), 12, "vae")
    assert runs.compare_killed("one") == 0
    killed = (tmp_path / "vae-killed-one" / "starts.jsonl").read_text().splitlines()
    assert [json.loads(line)["images_seen"] for line in killed] in ([0, 80], [0, 160])
    # A change of one loss or one weight is detected.
    other = tmp_path / "other"
    shutil.copytree(runs.whole("one"), other)
    log = other / "metrics.jsonl"
    first = json.loads(log.read_text().splitlines()[0])["train/loss"]
    log.write_text(log.read_text().replace(str(first), str(first * 1.01), 1))
    assert engines._loss_difference(other, runs.whole("one")) == pytest.approx(0.01)
    weights = other / "checkpoints" / f"{12 * engines.BATCH:09d}" / "model.safetensors"
    tensors = load_file(weights)
    next(value for value in tensors.values() if value.is_floating_point()).add_(1e-6)
    save_file(tensors, weights)
    assert 0 < engines._weight_difference(runs, other, runs.whole("one")) < 1e-3
