"""Command lines and YAML files: precedence, home folders, numbers, hints."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import LAUNCH

from dgm.cli.parser import (
    TRAINERS,
    family_module,
    make_options_parser,
    parse,
    parse_options,
    path_word,
)
from dgm.cli.sample import make_parser
from dgm.cli.suggestions import _KEY_OF, suggest_key, suggest_option
from dgm.cli.train_ddpm import Config
from dgm.common.command_line import Parser
from dgm.common.config_keys import flatten
from dgm.common.errors import UserError
from slurm.options import read_options
from slurm.sweep import read_sweep, words_of

KEYS = {family: list(flatten(family_module(family).Config())) for family in TRAINERS}


def written(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


@pytest.fixture
def base(tmp_path: Path) -> str:
    return written(tmp_path / "base.yaml", "optim: {lr: 0.5, clip_norm: 2}\nrun: {seed: 3}\n")


@pytest.mark.parametrize("form", ["--config FILE", "--config=FILE"])
def test_options_win_over_files_at_any_position(tmp_path: Path, base: str, form: str) -> None:
    files = form.replace("FILE", base).split(" ")
    for words in (
        ["--optim.lr", "1e-4", *files],
        ["--optim.lr=1e-4", *files],
        [*files, "--optim.lr=1e-4"],
    ):
        config = parse(Config, "", words)
        assert (config.optim.lr, config.optim.clip_norm, config.run.seed) == (1e-4, 2, 3), words
    over = written(tmp_path / "over.yaml", "optim: {lr: 0.25}\n")
    both = [*files, "--run.seed=4", *form.replace("FILE", over).split(" ")]
    config = parse(Config, "", both)
    assert (config.optim.lr, config.optim.clip_norm, config.run.seed) == (0.25, 2, 4)
    flag = parse(Config, "", ["--train.overfit_one_batch", *files])
    assert flag.train.overfit_one_batch
    assert flag.optim.lr == 0.5


def test_a_file_is_found_by_path_then_by_its_name_in_launch_configs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse(Config, "", ["--config", "ddpm_tiny.yaml"]).model.channels == 8
    written(tmp_path / "ddpm_tiny.yaml", "model: {channels: 16}\n")
    assert parse(Config, "", ["--config", "ddpm_tiny.yaml"]).model.channels == 16


def test_home_folder_in_keys_and_files(
    tmp_path: Path, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    written(tmp_path / "home.yaml", "run: {dir: ~/runs/x}\ndata: {source: 'folder:~/p'}\n")
    remote = "pipe:cat ~/x.tar"
    config = parse(
        Config, "", ["--config=~/home.yaml", "--data.shards=~/s", f"--data.test_shards={remote}"]
    )
    assert config.run.dir == f"{tmp_path}/runs/x"
    assert config.data.source == f"folder:{tmp_path}/p"
    assert config.data.shards == f"{tmp_path}/s"
    assert config.data.test_shards == remote
    address = "https://example.org/~ann/{000..004}.tar"
    assert parse(Config, "", ["--config", base, f"--data.shards={address}"]).data.shards == address
    with pytest.raises(UserError, match=r"run.dir is ~nobody-here/x, but .* \./~nobody-here/x"):
        parse(Config, "", ["--config", base, "--run.dir=~nobody-here/x"])
    config = parse(Config, "", ["--config", base, "--run.dir=./~nobody-here"])
    assert config.run.dir == "./~nobody-here"


def test_home_folder_in_options_of_scripts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    found = parse_options(make_parser(), ["~/run", "--out=~/x.png"])
    assert (found.run, found.out) == (f"{tmp_path}/run", f"{tmp_path}/x.png")
    several = make_options_parser("x")
    several.add_argument("runs", nargs="+", type=path_word)
    assert parse_options(several, ["~/a", "b"]).runs == [f"{tmp_path}/a", "b"]
    parser = Parser()
    parser.add_argument("folder", type=Path)
    assert parser.parse_args(["~/a"]).folder == tmp_path / "a"
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(["~nobody-here/a"])
    assert capsys.readouterr().err.count("\n") == 1
    words = [str(LAUNCH / "train_ddpm.py"), "--cluster", "local"]
    options = read_options([*words, "--config=~/c.yaml", "--sweep=~/s.yaml"]).options
    assert (options.config, options.sweep) == (f"{tmp_path}/c.yaml", f"{tmp_path}/s.yaml")
    with pytest.raises(UserError, match="--sweep is ~nobody-here/s, but"):
        read_options([*words, "--sweep=~nobody-here/s"])


NUMBERS = [("010", 10), ("0x10", 16), ("1_000", 1000), ("1e5", 100_000), ("100000.0", 100_000)]


@pytest.mark.parametrize(("text", "number"), NUMBERS)
def test_whole_numbers_of_words_files_and_sweeps(tmp_path: Path, text: str, number: int) -> None:
    file = written(tmp_path / "n.yaml", f"run: {{seed: {text}}}\ntrain: {{micro_batch: {text}}}\n")
    sweep = read_sweep(
        Path(written(tmp_path / "sweep.yaml", f"sets: {{a: {{run.seed: {text}}}}}\n"))
    )
    empty = written(tmp_path / "empty.yaml", "")
    for words in (
        ["--config", file],
        ["--config", empty, f"--run.seed={text}", "--train.micro_batch", text],
        ["--config", empty, *words_of(sweep["a"]), f"--train.micro_batch={text}"],
    ):
        config = parse(Config, "", words)
        assert (config.run.seed, config.train.micro_batch) == (number, number), words
        assert type(config.run.seed) is int
    assert parse_options(make_parser(), ["run", "--seed", text]).seed == number


@pytest.mark.parametrize("text", ["1.5", "1e-4", "1e40"])
def test_values_that_are_no_whole_numbers_are_refused(tmp_path: Path, text: str) -> None:
    file = written(tmp_path / "n.yaml", f"run: {{seed: {text}}}\n")
    for words in (["--config", file], ["--config", "/dev/null", f"--run.seed={text}"]):
        with pytest.raises(UserError, match=r"run.seed is .*: give a whole number"):
            parse(Config, "", words)


def test_other_values_of_files(tmp_path: Path) -> None:
    text = "optim: {lr: 1e-4}\nrun: {dir: 2024}\n"
    text += "train: {kernels: off, tf32: yes, mixed_precision: no}\n"
    config = parse(Config, "", ["--config", written(tmp_path / "v.yaml", text)])
    assert (config.optim.lr, config.train.kernels, config.train.tf32) == (1e-4, False, True)
    assert (config.train.mixed_precision, config.run.dir) == ("no", "2024")


def test_foreign_names_lead_to_existing_keys() -> None:
    every = {key for keys in KEYS.values() for key in keys}
    assert set(_KEY_OF.values()) <= every
    for name, key in _KEY_OF.items():
        for family, keys in KEYS.items():
            hint = suggest_key(name, keys) or ""
            assert key not in keys or key in hint, (family, name, hint)
            named = [word.strip("?,()") for word in hint.split() if "." in word.strip("?.,()")]
            assert all(word in {*keys, "data.shards", "train.global_batch"} for word in named), hint
    assert suggest_key("colour", KEYS["gan"]) is None
    assert suggest_key("num_images", KEYS["diffusion"]) == "did you mean eval.num_images?"
    assert "accelerate launch" in (suggest_key("gpus", KEYS["diffusion"]) or "")


def test_foreign_names_of_options() -> None:
    known = [option for action in make_parser()._actions for option in action.option_strings]
    for name, option in (("cfg-scale", "guidance"), ("ckpt", "checkpoint")):
        assert suggest_option(f"--{name}", known) == f"did you mean --{option}?"
    assert suggest_option("--colour", known) is None


def test_a_configuration_of_another_family_names_its_trainer() -> None:
    with pytest.raises(UserError, match=r"flow_tiny.yaml .*the key model.* launch/train_flow.py"):
        parse(Config, "", ["--config", "flow_tiny.yaml"])


@pytest.mark.parametrize(
    ("text", "line", "remedy"),
    [
        ("train\n  lr: 1\n", 1, "'train: '"), ("run:\n  seed:3\n  dir: x\n", 2, "'seed: '"),
        ("run:\n  dir: x\n\tseed: 1\n", 3, "spaces"), ("run: a: b\n", 1, "correct"),
        ("run:\n  seed: 1\n   dir: x\n", 3, "correct"),
    ],
)  # fmt: skip
def test_a_missing_colon_or_a_tab_is_named_with_its_own_line(
    tmp_path: Path, text: str, line: int, remedy: str
) -> None:
    with pytest.raises(UserError, match=rf"\(line {line}: ") as caught:
        parse(Config, "", ["--config", written(tmp_path / "c.yaml", text)])
    assert remedy in str(caught.value)
