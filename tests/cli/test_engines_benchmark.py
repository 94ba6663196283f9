"""The benchmark of engines: it compares real runs, and detects differences."""

from __future__ import annotations

import json
import shutil
from argparse import ArgumentParser
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from dgm.benchmarks import engines


@pytest.fixture(scope="module")
def runs(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> engines.Runs:
    """Return runs of a VAE with twelve steps each."""
    return engines.Runs(tmp_path_factory.mktemp("engines"), str(tiny_shards), 12, "vae")


@pytest.mark.slow
@pytest.mark.long
def test_losses_on_two_processes_are_those_on_one(runs: engines.Runs) -> None:
    assert 0 < runs.compare_whole("ddp2") < 1e-5


@pytest.mark.slow
@pytest.mark.long
def test_killed_runs_are_compared_with_whole_ones(runs: engines.Runs) -> None:
    assert runs.compare_killed("one") == 0
    killed = (runs.folder / "vae-killed-one" / "starts.jsonl").read_text().splitlines()
    assert [json.loads(line)["images_seen"] for line in killed] in ([0, 80], [0, 160])
    # A change of one loss or one weight is detected.
    other = runs.folder / "other"
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


def test_tables_have_a_row_for_each_engine(
    tiny_shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    differences = {"ddp2": 1.6e-7, "zero3": 0.0, "moved": 1e-3}
    parts = {part: (title, lambda run, engine: differences[engine])
             for part, (title, _) in engines.PARTS.items()}  # fmt: skip
    monkeypatch.setattr(engines, "PARTS", parts)
    parser = ArgumentParser()
    engines.add_arguments(parser)
    words = ["--families", "vae", "gan", "--engines", "ddp2", "zero3", "--shards", str(tiny_shards)]
    found = engines.measure(parser.parse_args(words))
    assert found["losses"]["DDP on 2"] == {"vae": 1.6e-7, "gan": 1.6e-7}
    assert list(found) == ["losses", "resume", "moves"]
    printed = capsys.readouterr().out.splitlines()
    assert printed.count("| DDP on 2 | 1.6e-07 | 1.6e-07 |") == 2
    assert printed.count("| ZeRO-3 on 2 | 0, same bits | 0, same bits |") == 2
    assert printed[-1].startswith("| one process, DDP on 2, ZeRO-3") and "1.0e-03" in printed[-1]
