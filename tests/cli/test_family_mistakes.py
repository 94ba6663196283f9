"""Mistakes with the families beside those of tests/bad_inputs, and what they can do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import SCRIPTS

LAUNCH = Path(__file__).parents[2] / "launch"


def assert_refused(result, *parts: str) -> None:
    assert result.code == 2, result.stderr
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    missing = [part for part in parts if part not in lines[0]]
    assert not missing, f"{missing} not in: {lines[0]}"


@pytest.mark.parametrize(
    ("family", "options", "parts"),
    [
        ("gan", ["--model.latent=0"], ["model.latent is 0", "1 or more"]),
        ("gan", ["--gan.loss=wasserstein"], ["gan.loss", "wasserstein", "hinge"]),
        ("gan", ["--eval.every_images=-1"], ["eval.every_images is -1"]),
        ("vae", ["--model.latent=0"], ["model.latent is 0"]),
        ("vae", ["--model.encoder=round"], ["model.encoder", "round", "encoder_decoder"]),
        ("vae", ["--vae.likelihood=cauchy"], ["vae.likelihood", "cauchy", "gaussian"]),
        ("vae", ["--vae.beta=-1"], ["vae.beta is -1"]),
        ("vae", ["--vae.free_bits=-0.1"], ["vae.free_bits is -0.1"]),
        ("flow", ["--model.steps=0"], ["model.steps is 0"]),
        ("flow", ["--model.architecture=nice"], ["model.architecture", "nice", "realnvp"]),
        ("flow", ["--sample.temperature=-1"], ["sample.temperature is -1"]),
    ],
)  # fmt: skip
def test_bad_option_is_named_with_its_value_and_leaves_nothing(
    run_warm: Callable,
    tiny_configs: dict[str, Path],
    tmp_path: Path,
    family: str,
    options: list[str],
    parts: list[str],
) -> None:
    words = [LAUNCH / SCRIPTS[family], "--config", tiny_configs[family], "--run.dir", "run"]
    assert_refused(run_warm(*words, *options, cwd=tmp_path), *parts)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def runs(
    run_warm: Callable, tiny_configs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Train the smallest runs of three families."""
    folder = tmp_path_factory.mktemp("runs")
    for family in ("gan", "flow", "vae"):
        words = ["--config", tiny_configs[family], "--run.dir", folder / family]
        done = run_warm(LAUNCH / SCRIPTS[family], *words, "--train.total_images=32")
        assert done.code == 0, done.stderr
    return {family: folder / family for family in ("gan", "flow", "vae")}


@pytest.mark.slow
def test_run_of_another_family_or_architecture_is_not_continued(
    run_warm: Callable, runs: dict[str, Path], tiny_configs: dict[str, Path]
) -> None:
    def start(family: str, *options: str):
        words = ["--config", tiny_configs[family], "--run.dir", runs["gan"]]
        return run_warm(LAUNCH / SCRIPTS[family], *words, *options)

    assert_refused(start("vae"), "another family", "gan", "another run.dir")
    other = start("gan", "--model.architecture=dcgan", "--model.discriminator_batch_norm=false")
    assert_refused(other, "model.architecture was 'residual', is 'dcgan'")


@pytest.mark.slow
def test_flow_is_sampled_and_measured(
    run_warm: Callable, runs: dict[str, Path], tmp_path: Path
) -> None:
    made = run_warm(LAUNCH / "sample.py", runs["flow"], "--out", tmp_path / "made")
    assert made.code == 0 and (tmp_path / "made.png").is_file(), made.stderr
    words = ["--metrics", "bits_per_dim", "--num_test", "20"]
    found = run_warm(LAUNCH / "evaluate.py", runs["flow"], *words)
    assert found.code == 0, found.stderr
    assert "bits per dim" in found.stdout and "bits/dim, exact for dequantised data" in found.stdout


@pytest.mark.slow
def test_importance_weighted_bound_of_a_vae_is_the_closer_one(
    run_warm: Callable, runs: dict[str, Path]
) -> None:
    options = ["--num_test", "40", "--importance_samples", "20", "--metrics", "bits_per_dim"]
    done = run_warm(LAUNCH / "evaluate.py", runs["vae"], *options)
    assert done.code == 0, done.stderr
    bits = json.loads((runs["vae"] / "evaluation.json").read_text())["bits_per_dim"]
    assert bits["num_test_images"] == 40 and bits["importance_samples"] == 20
    assert bits["importance_weighted"] < bits["bound"]
    assert bits["reconstruction_nll"] + bits["kl"] == pytest.approx(bits["bound"])


@pytest.mark.slow
def test_checkpoint_files_of_another_architecture_are_named(
    run_warm: Callable, runs: dict[str, Path], tmp_path: Path
) -> None:
    config = runs["gan"] / "config.yaml"
    before = config.read_text()
    try:
        other = before.replace("architecture: residual", "architecture: dcgan")
        other = other.replace("discriminator_batch_norm: true", "discriminator_batch_norm: false")
        config.write_text(other)
        result = run_warm(LAUNCH / "sample.py", runs["gan"])
        assert_refused(result, "does not fit the model at", "discriminator", "config.yaml")
    finally:
        config.write_text(before)
