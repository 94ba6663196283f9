"""Mistakes with a trained run, damaged shards or several processes; others: tests/bad_inputs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import LAUNCH, SCRIPTS

SCRIPT = LAUNCH / "train_ddpm.py"


def assert_one_line(stderr: str, *parts: str) -> None:
    """Check that there is one line, an error, with these parts."""
    lines = stderr.splitlines()
    assert len(lines) == 1, stderr
    assert lines[0].startswith("error: ")
    missing = [part for part in parts if part not in lines[0]]
    assert not missing, f"{missing} not in: {lines[0]}"


def assert_refused(result, *parts: str) -> None:
    assert result.code == 2, result.stderr
    assert_one_line(result.stderr, *parts)


def test_damaged_shards_are_named(
    run_warm: Callable, tiny_config: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    def refuse(folder: Path, *parts: str) -> None:
        words = [SCRIPT, "--config", tiny_config, "--run.dir", tmp_path / "run"]
        assert_refused(run_warm(*words, "--data.shards", folder), *parts)
        assert not (tmp_path / "run").exists()

    empty, damaged = tmp_path / "empty", tmp_path / "damaged"
    empty.mkdir()
    refuse(empty, str(empty), "holds no shards", "python -m shards.build")
    shutil.copytree(tiny_shards, damaged)
    tar = sorted(damaged.glob("*.tar"))[2]
    content = bytearray(tar.read_bytes())
    content[5000] ^= 1
    tar.write_bytes(content)
    refuse(damaged, str(tar), "build")
    tar.unlink()
    refuse(damaged, str(tar))


def test_changed_key_of_a_run_is_reported_and_the_run_stays_as_it_is(
    run_warm: Callable, tiny_config: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = [SCRIPT, "--config", tiny_config, "--run.dir", run, "--train.total_images=16"]
    assert run_warm(*words).code == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    result = run_warm(*words, "--optim.lr=0.5", "--run.seed=7")
    assert_refused(
        result, str(run), "optim.lr was 0.002, is 0.5", "run.seed was 0, is 7", "another"
    )
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_two_processes_report_a_mistake_once(
    run_script: Callable, run_warm: Callable, tiny_config: Path, tmp_path: Path
) -> None:
    words = [SCRIPT, "--config", tiny_config, "--run.dir", tmp_path / "run"]
    odd = [*words, "--train.global_batch=15"]
    result = run_warm(*odd, processes=2)
    assert_refused(result, "train.global_batch 15", "2 processes", "a multiple of 2")
    # The first process alone finds this one; the others must not wait for it forever.
    result = run_warm(*words, "--data.shards=nowhere", processes=2)
    assert_refused(result, "nowhere", "do not exist")
    launched = run_script(*odd, processes=2)
    assert launched.code != 0
    assert launched.stderr.count("error: train.global_batch 15") == 1
    assert 'train_ddpm.py", line' not in launched.stderr, "the script left a traceback"
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_plain_python_and_accelerate_report_a_mistake_alike(
    run_script: Callable, tiny_config: Path, tmp_path: Path
) -> None:
    words = [SCRIPT, "--config", tiny_config, "--run.dir", tmp_path / "run"]
    plain = run_script(*words, "--train.total_images=0")
    assert plain.stdout == ""
    assert_refused(plain, "train.total_images is 0", "1 or more")
    cpu = run_script("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", *words)
    assert cpu.code != 0
    errors = [line for line in cpu.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "--multi_gpu" in errors[0], cpu.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_another_architecture_is_neither_continued_nor_sampled(
    run_warm: Callable, tiny_run: Callable[[str], Path], tiny_configs: dict[str, Path], tmp_path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run("gan"), run)
    options = ["--model.architecture=dcgan", "--model.discriminator_batch_norm=false"]
    words = [LAUNCH / SCRIPTS["gan"], "--config", tiny_configs["gan"], "--run.dir", run]
    assert_refused(run_warm(*words, *options), "model.architecture was 'residual', is 'dcgan'")
    text = (run / "config.yaml").read_text()
    other = text.replace("architecture: residual", "architecture: dcgan")
    other = other.replace("discriminator_batch_norm: true", "discriminator_batch_norm: false")
    (run / "config.yaml").write_text(other)
    result = run_warm(LAUNCH / "sample.py", run)
    assert_refused(result, "does not fit the model at", "discriminator", "config.yaml")


@pytest.mark.slow
def test_flow_is_sampled_and_evaluated(
    run_warm: Callable, tiny_run: Callable[[str], Path], tmp_path: Path
) -> None:
    sampled = run_warm(LAUNCH / "sample.py", tiny_run("flow"), "--out", tmp_path / "samples")
    assert sampled.code == 0 and (tmp_path / "samples.png").is_file(), sampled.stderr
    words = ["--metrics", "bits_per_dim", "--num_test", "20"]
    found = run_warm(LAUNCH / "evaluate.py", tiny_run("flow"), *words)
    assert found.code == 0, found.stderr
    assert "bits per dim" in found.stdout and "bits/dim, exact for dequantised data" in found.stdout


@pytest.mark.slow
def test_importance_weighted_bound_of_a_vae_is_the_tighter_one(
    run_warm: Callable, tiny_run: Callable[[str], Path]
) -> None:
    options = ["--num_test", "40", "--importance_samples", "20", "--metrics", "bits_per_dim"]
    done = run_warm(LAUNCH / "evaluate.py", tiny_run("vae"), *options)
    assert done.code == 0, done.stderr
    bits = json.loads((tiny_run("vae") / "evaluation.json").read_text())["bits_per_dim"]
    assert bits["num_test_images"] == 40 and bits["importance_samples"] == 20
    assert bits["importance_weighted"] < bits["bound"]
    assert bits["reconstruction_nll"] + bits["kl"] == pytest.approx(bits["bound"])
