"""A mistake with any family ends with code 2 and one line that says what to change."""

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
        ("gan", ["--gan.r1=-1"], ["gan.r1 is -1"]),
        ("gan", ["--gan.loss=wasserstein"], ["gan.loss", "wasserstein", "hinge"]),
        ("gan", ["--gan.discriminator_steps=0"], ["gan.discriminator_steps is 0"]),
        ("gan", ["--gan.augment=[blur]"], ["gan.augment", "blur", "cutout"]),
        ("gan", ["--gan.augment_probability=0"], ["gan.augment_probability is 0", "at most 1"]),
        ("gan", ["--train.micro_batch=4"], ["train.micro_batch 4", "BatchNorm"]),
        ("gan", ["--eval.every_images=64", "--eval.metric=bits_per_dim"],
         ["eval.metric is bits_per_dim", "no likelihood", "fd_classifier"]),
        ("gan", ["--eval.every_images=-1"], ["eval.every_images is -1"]),
        ("gan", ["--diffusion.schedule=linear"], ["diffusion.schedule"]),
        ("vae", ["--model.latent=0"], ["model.latent is 0"]),
        ("vae", ["--model.encoder=round"], ["model.encoder", "round", "encoder_decoder"]),
        ("vae", ["--vae.likelihood=cauchy"], ["vae.likelihood", "cauchy", "gaussian"]),
        ("vae", ["--vae.beta=-1"], ["vae.beta is -1"]),
        ("vae", ["--vae.free_bits=-0.1"], ["vae.free_bits is -0.1"]),
        ("vae", ["--sample.temperature=0"], ["sample.temperature is 0"]),
        ("flow", ["--model.levels=6"], ["model.levels 6", "32 x 32", "lower it"]),
        ("flow", ["--model.steps=0"], ["model.steps is 0"]),
        ("flow", ["--model.hidden=0"], ["model.hidden is 0"]),
        ("flow", ["--model.architecture=nice"], ["model.architecture", "nice", "realnvp"]),
        ("flow", ["--sample.temperature=-1"], ["sample.temperature is -1"]),
        ("flow", ["--eval.every_images=64", "--data.test_shards=null"],
         ["data.test_shards", "eval.every_images 0"]),
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
    other = start("gan", "--model.architecture=dcgan")
    assert_refused(other, "model.architecture was 'residual', is 'dcgan'")


@pytest.mark.slow
def test_what_a_family_cannot_do_is_said(run_warm: Callable, runs: dict[str, Path]) -> None:
    sample, evaluate = LAUNCH / "sample.py", LAUNCH / "evaluate.py"
    mistakes: list[tuple[list, list[str]]] = [
        ([evaluate, runs["gan"], "--measure", "bits_per_dim"], ["bits_per_dim", "no likelihood"]),
        ([evaluate, runs["gan"], "--measure", "beauty"], ["'beauty'", "class_consistency"]),
        ([evaluate, runs["flow"], "--measure", "class_consistency"], ["without classes"]),
        ([evaluate, runs["flow"], "--importance_samples", "5"], ["--importance_samples is 5"]),
        ([evaluate, runs["vae"], "--importance_samples", "-1"], ["--importance_samples is -1"]),
        ([evaluate, runs["gan"], "--checkpoint", "best"], ["no best checkpoint", "eval.every"]),
        ([sample, runs["gan"], "--guidance", "2"], ["--guidance", "gan", "truncation"]),
        ([sample, runs["flow"], "--classes", "ring"], ["--classes is ring", "without classes"]),
        ([sample, runs["flow"], "--temperature", "0"], ["sample.temperature is 0"]),
        ([sample, runs["flow"], "--checkpoint", "last"], ["--checkpoint is last", "best"]),
    ]
    for words, parts in mistakes:
        assert_refused(run_warm(*words), *parts)


@pytest.mark.slow
def test_flow_is_sampled_and_measured(
    run_warm: Callable, runs: dict[str, Path], tmp_path: Path
) -> None:
    made = run_warm(LAUNCH / "sample.py", runs["flow"], "--out", tmp_path / "made")
    assert made.code == 0 and (tmp_path / "made.png").is_file(), made.stderr
    words = ["--measure", "bits_per_dim", "--num_test", "20"]
    found = run_warm(LAUNCH / "evaluate.py", runs["flow"], *words)
    assert found.code == 0, found.stderr
    assert "bits per dim" in found.stdout and "bits/dim, exact" in found.stdout


@pytest.mark.slow
def test_importance_weighted_bound_of_a_vae_is_the_closer_one(
    run_warm: Callable, runs: dict[str, Path]
) -> None:
    options = ["--num_test", "40", "--importance_samples", "20", "--measure", "bits_per_dim"]
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
        config.write_text(before.replace("architecture: residual", "architecture: dcgan"))
        result = run_warm(LAUNCH / "sample.py", runs["gan"])
        assert_refused(result, "does not fit the model at", "discriminator", "config.yaml")
    finally:
        config.write_text(before)
