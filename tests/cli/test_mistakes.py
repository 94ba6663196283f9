"""Mistakes on two processes, or with another architecture; others: tests/bad_inputs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from errors import error_of
from tiny import LAUNCH, SCRIPTS

pytestmark = pytest.mark.slow


def test_two_processes_report_a_mistake_once(
    train: Callable, run_script: Callable, tiny_configs: dict[str, Path], tmp_path: Path
) -> None:
    error = error_of(train("--train.global_batch=15", processes=2))
    for part in ("train.global_batch 15", "2 processes", "a multiple of 2"):
        assert part in error
    # Only the first process finds this one; the others must not wait for it forever.
    assert "nowhere do not exist" in error_of(train("--data.shards=nowhere", processes=2))
    words = [LAUNCH / SCRIPTS["vae"], "--config", tiny_configs["vae"]]
    words += ["--run.dir", tmp_path / "run"]
    cpu = run_script("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", *words)
    assert cpu.code != 0
    (error,) = [line for line in cpu.stderr.splitlines() if line.startswith("error: ")]
    assert "--multi_gpu" in error
    assert not (tmp_path / "run").exists()


def test_a_run_of_another_architecture_is_not_sampled(
    run_warm: Callable, tiny_run: Callable[[str], Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run("gan"), run)
    text = (run / "config.yaml").read_text()
    other = text.replace("architecture: residual", "architecture: dcgan")
    other = other.replace("discriminator_batch_norm: true", "discriminator_batch_norm: false")
    (run / "config.yaml").write_text(other)
    error = error_of(run_warm(LAUNCH / "sample.py", run))
    for part in ("does not fit the model at", "discriminator", "config.yaml"):
        assert part in error
