"""The benchmarks of sampling, of growing data, of several processes, and of all in one command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.benchmarks import everything
from launch.benchmarks.scaling import model

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "benchmark.py"


@pytest.mark.slow
@pytest.mark.long
def test_everything_leaves_figures_and_pictures(
    run_script: Callable, tiny_shards: Path, tmp_path: Path
):
    out, parts = tmp_path / "out", ["kernels", "sample", "train"]
    done = run_script(
        SCRIPT, "everything", "--out", out, "--size", "tiny", "--shards", tiny_shards,
        "--parts", *parts, "--json", tmp_path / "all.json", timeout=400,
    )  # fmt: skip
    assert done.code == 0, done.stderr
    found = json.loads((tmp_path / "all.json").read_text())["everything"]
    assert list(found) == parts
    assert all(part["code"] == 0 for part in found.values()), done.stdout
    assert found["sample"]["measured"]["sample"]["images_per_s"]["ours"][0] > 0
    assert found["kernels"]["measured"]["noise"]["gb_per_s"] > 0
    assert (out / "sample.txt").read_text() and list((out / "run" / "samples").glob("*.png"))


def test_every_part_names_a_command_for_every_size():
    for size in everything.SIZES.values():
        for make in filter(None, everything.PARTS.values()):
            for words in make(size, []):
                assert words[0] in ("noise", "step", "sample")


@pytest.mark.slow
def test_growing_data_is_measured_on_the_same_bytes(
    run_script: Callable, tiny_shards: Path, tmp_path: Path
):
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
def test_two_processes_send_each_gradient_once_round(
    run_script: Callable, tiny_shards: Path, tmp_path: Path
):
    out = tmp_path / "scaling.json"
    done = run_script(
        SCRIPT, "scaling", "--shards", tiny_shards, "--channels", 16, "--batch", 2, "--rounds", 3,
        "--steps", 2, "--json", out,
    )  # fmt: skip
    assert done.code == 0, done.stderr
    found = json.loads(out.read_text())["scaling"]
    # A ring of two sends one gradient from each; tests beside it may use the loopback too.
    assert found["sent_bytes"] > 0.95 * found["gradient_bytes"]
    assert found["step_s"] > 0 and found["average_s"] > 0 and 0 <= found["hidden"] <= 1


def test_model_hides_sending_behind_two_thirds_of_the_step():
    eight, _, most = model(120e6, 1e-4, [300, 40, 40])
    assert eight["sending_ms"] == pytest.approx(2 * 7 / 8 * 120e6 / 300e9 * 1e3)
    assert most["batch_that_hides"] == pytest.approx(2 * 511 / 512 * 120e6 / 40e9 / (2e-4 / 3))


@pytest.mark.parametrize(
    "words, said",
    [
        (["growth", "--images", "10"], "--images has 10: choose at least --batch 128"),
        (["scaling", "--processes", "1"], "--processes is 1: choose 2 to 256"),
        (["scaling", "--links", "1"], "--links is [1.0]: give three numbers above 0"),
        (["sample", "--steps", "0"], "--steps is 0: choose 1 or more"),
        (
            ["everything", "--out", "x", "--minutes", "0"],
            "--minutes is 0.0: choose a number above 0",
        ),
    ],
)
def test_settings_that_make_no_sense_are_named(run_warm: Callable, words: list[str], said: str):
    done = run_warm(SCRIPT, *words)
    assert done.code == 2 and done.stderr == f"error: {said}\n"
