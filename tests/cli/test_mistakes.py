"""A trainer's mistakes beside those of tests/bad_inputs: with values of a run, on two processes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "launch" / "train_ddpm.py"


def assert_one_line(stderr: str, *parts: str) -> None:
    """Check that there is one line, an error, that holds these parts."""
    lines = stderr.splitlines()
    assert len(lines) == 1, stderr
    assert lines[0].startswith("error: ")
    missing = [part for part in parts if part not in lines[0]]
    assert not missing, f"{missing} not in: {lines[0]}"


@pytest.fixture
def refused(run_warm: Callable, tiny_config: Path, tmp_path: Path) -> Callable[..., None]:
    """Return a check that a start is refused by a line with these parts and leaves no trace."""
    (tmp_path / "here").mkdir()

    def check(options: list[object], parts: list[str], config: Path = tiny_config) -> None:
        words = [SCRIPT, "--config", config, "--run.dir", "run", *options]
        result = run_warm(*words, cwd=tmp_path / "here")
        assert result.code == 2, result.stderr
        assert_one_line(result.stderr, *parts)
        assert not list((tmp_path / "here").iterdir())

    return check


@pytest.mark.parametrize(
    ("option", "parts"),
    [
        ("--optim.lr=-1", ["optim.lr is -1", "above 0"]),
        ("--optim.lr=nan", ["optim.lr", "nan", "float"]),
        ("--optim.clip_norm=-1", ["optim.clip_norm is -1", "0 or more"]),
        ("--diffusion.num_timesteps=0", ["diffusion.num_timesteps", "0"]),
        ("--model.channel_mult=[1,2,2,2,2,2]", ["model.num_blocks", "6"]),
        ("--model.patch_size=3", ["model.patch_size", "32"]),
        ("--model.dropout=1.5", ["model.dropout", "1.5"]),
        ("--train.mixed_precision=fp8", ["train.mixed_precision", "fp8", "bf16"]),
        ("--train.save_every_images", ["train.save_every_images", "expected one argument"]),
    ],
)
def test_bad_option_is_named_with_its_value(
    refused: Callable, option: str, parts: list[str]
) -> None:
    refused([option], parts)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (
            ["--model.channel_mult=[1,1,1,1,1,1,1]", "--model.num_blocks=[1,1,1,1,1,1,1]"],
            ["32", "128", "model.patch_size 2", "7 levels"],
        ),
    ],
)
def test_settings_that_clash_are_named(
    refused: Callable, options: list[str], parts: list[str]
) -> None:
    refused(options, parts)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("train: {global_bach: 16}\n", ["train.global_bach", "did you mean train.global_batch?"]),
        ("colour: red\n", ["bad.yaml", "colour", "--help"]),
        ("train: 3\n", ["bad.yaml", "the section train"]),
        ("optim: {lr: fast}\n", ["optim.lr", "fast", "float"]),
    ],
)
def test_bad_config_file_is_named(
    refused: Callable, tmp_path: Path, text: str, parts: list[str]
) -> None:
    config = tmp_path / "bad.yaml"
    config.write_text(text)
    refused([], parts, config)


def test_damaged_shards_are_named(refused: Callable, tiny_shards: Path, tmp_path: Path) -> None:
    empty, damaged = tmp_path / "empty", tmp_path / "damaged"
    empty.mkdir()
    refused(["--data.shards", empty], [str(empty), "holds no shards", "python -m shards.build"])
    shutil.copytree(tiny_shards, damaged)
    tar = sorted(damaged.glob("*.tar"))[2]
    content = bytearray(tar.read_bytes())
    content[5000] ^= 1
    tar.write_bytes(content)
    refused(["--data.shards", damaged], [str(tar), "build"])
    tar.unlink()
    refused(["--data.shards", damaged], [str(tar)])


def test_changed_key_of_a_run_is_shown_with_both_values_and_the_run_stays_as_it_is(
    run_warm: Callable, tiny_config: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = [SCRIPT, "--config", tiny_config, "--run.dir", run, "--train.total_images=16"]
    assert run_warm(*words).code == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    result = run_warm(*words, "--optim.lr=0.5", "--run.seed=7")
    assert result.code == 2
    assert_one_line(
        result.stderr, str(run), "optim.lr was 0.002, is 0.5", "run.seed was 0, is 7", "another"
    )
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_two_processes_say_what_is_wrong_once(
    run_script: Callable, run_warm: Callable, tiny_config: Path, tmp_path: Path
) -> None:
    words = [SCRIPT, "--config", tiny_config, "--run.dir", tmp_path / "run"]
    odd = [*words, "--train.global_batch=15"]
    result = run_warm(*odd, processes=2)
    assert result.code == 2
    assert_one_line(result.stderr, "train.global_batch 15", "2 processes", "a multiple of 2")
    # What the first process alone finds out reaches the others, who would wait for it otherwise.
    result = run_warm(*words, "--data.shards=nowhere", processes=2)
    assert result.code == 2
    assert_one_line(result.stderr, "nowhere", "do not exist")
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
    assert plain.code == 2
    assert plain.stdout == ""
    assert_one_line(plain.stderr, "train.total_images is 0", "1 or more")
    cpu = run_script("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", *words)
    assert cpu.code != 0
    said = [line for line in cpu.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "--multi_gpu" in said[0], cpu.stderr
    assert not (tmp_path / "run").exists()
