"""YAML files are read completely or refused in one line that names file and line."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from damage import attempt, changed, damaged, examples
from hypothesis import given
from hypothesis import strategies as st
from tiny import LAUNCH, TINY

from dgm.cli.exercise_plan import FOLDER, read_plan
from dgm.cli.parser import CONFIGS, parse
from dgm.cli.train_ddpm import Config
from dgm.common import yaml_io
from dgm.common.errors import UserError
from slurm.options import read_options
from slurm.sweep import read_sweep, words_of

ROOT = LAUNCH.parent

SWEEP = b"""# which rates
sets:
  plain: {}
  warm: {optim: {warmup_images: 100}, model.channel_mult: [1, 2]}
grid:
  optim.lr: [1e-3, 0.002]
  run.seed: [0, 1]
"""
PROFILE = b"gpus_per_node: 0\nnodes: 1-2\ntime: 12:00:00\nsetup: [module load x]\nsbatch: {a: b}\n"
MARKS = st.text("{}[]:,-&*!|>'\"\n\t #%@`a1~?<=._e\0\x85\u2028é", max_size=40)


def written(folder: Path, content: bytes) -> Path:
    path = folder / "input.yaml"
    path.write_bytes(content)
    return path


@examples(150)
@given(content=st.one_of(damaged(SWEEP), damaged(PROFILE), MARKS.map(str.encode)))
def test_yaml_is_read_or_refused(tmp_path: Path, content: bytes) -> None:
    path = written(tmp_path, content)
    for as_text in (False, True):
        found = attempt(lambda w=as_text: yaml_io.read_yaml(path, w), path)
        assert found is None or all(type(key) is str for key in found)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**50), 10**50) | st.floats(allow_nan=False)
    | st.text() | st.sampled_from(["1e4", "1e-4", "2020-01-01", "=", "on", "0x1", "1:30", "null"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@examples(100)
@given(content=st.dictionaries(st.text(), VALUES, max_size=4))
def test_yaml_round_trip(tmp_path: Path, content: dict) -> None:
    text = yaml_io.write_yaml(content)
    if "\\0" in text or "\\uD" in text:  # which no argument or file name can hold
        return
    assert yaml_io.read_yaml(written(tmp_path, text.encode())) == content


def bomb(letters: str, inside: str) -> str:
    """Return lists, each of nine aliases of the one before."""
    lines = [f"{letters[0]}: &{letters[0]} {inside}"]
    for before, now in itertools.pairwise(letters):
        lines.append(f"{now}: &{now} [{','.join(['*' + before] * 9)}]")
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a: 1\nb:\n  c: 1\n  d: 2\n  c: 3\n", ["gives c twice, in lines 3 and 5", "remove one"]),
        ("a:\n\tb: 1\n", ["line 2", "not by tabs"]),
        ("a: 1\nb: [\n", ["line 2", "correct"]),
        ("- a\n", ["not a YAML file of keys", "KEY: VALUE"]),
        ("a: 1\n---\nb: 1\n", ["line 2", "another document"]),
        (bomb("abcdefghijkl", "[x]"), ["more than 20,000 values", "line 6", "aliases"]),
        (bomb("abcdefghijkl", "{x: 1}").replace(" [", " {<<: [").replace("]", "]}"), ["20,000"]),
        ("a: &a [*a]\n", ["contains itself", "line 1"]),
        ("a: " + "[" * 10_000, ["deeper than 40", "line 1"]),
        ("a: [" + "1," * 100_000 + "]", ["more than 20,000 values"]),
        ("a: " + "x" * 2**20, ["more than 1,048,576 bytes"]),
        ("a: " + "1" * 5000, ["number of 5000 digits", "line 1"]),
        ("a: 1\nb: !!python/object/apply:os.system [ls]\n", ["tag", "os.system", "line 2"]),
        ("a: !!python/name:os.system\n", ["tag !!python/name:os.system in line 1"]),
        ("a: !!int x\n", ["does not fit its tag"]),
        ('a: "\\0"\n', ["zero byte", "line 1"]),
        ("? [a]\n: 1\n", ["key that is a list", "line 1"]),
    ],
)
def test_mistakes_in_yaml_are_errors_with_their_line(
    tmp_path: Path, text: str, parts: list[str]
) -> None:
    path = written(tmp_path, text.encode())
    with pytest.raises(UserError) as caught:
        yaml_io.read_yaml(path)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(str(path)), message
    assert all(part in message for part in parts), message


def test_yaml_that_is_not_utf8_is_an_error_with_its_line(tmp_path: Path) -> None:
    for content, line in ((b"a: 1\nb: \xff\n", 2), ("a: 1\n".encode("utf-16"), 1)):
        with pytest.raises(
            UserError, match=rf"input\.yaml is not valid UTF-8 \(line {line}\): save"
        ):
            yaml_io.read_yaml(written(tmp_path, content))


def test_numbers_are_read_as_the_trainers_read_them(tmp_path: Path) -> None:
    text = b"a: 1e-4\nb: 2E3\nc: 1.5e2\nd: 1e-3abc\ne: 2020-01-01\non: 3\n1: 4\n"
    found = yaml_io.read_yaml(written(tmp_path, text))
    assert found == {
        "a": 1e-4, "b": 2000.0, "c": 150.0, "d": "1e-3abc", "e": "2020-01-01", "on": 3, "1": 4,
    }  # fmt: skip


@examples(100)
@given(content=damaged(SWEEP))
def test_a_damaged_sweep(tmp_path: Path, content: bytes) -> None:
    path = written(tmp_path, content)
    for keys in (attempt(lambda: read_sweep(path), path) or {}).values():
        assert all(word.startswith("--") and "\0" not in word for word in words_of(keys))


@examples(100)
@given(content=changed({"sets": {"a": {"optim": {"lr": 1}}}, "grid": {"run.seed": [0, 1]}}))
def test_a_sweep_with_changed_values(tmp_path: Path, content: dict) -> None:
    path = written(tmp_path, yaml_io.write_yaml(content).encode())
    for keys in (attempt(lambda: read_sweep(path), path) or {}).values():
        words_of(keys)


@examples(25)
@given(content=damaged(PROFILE))
def test_a_damaged_cluster_file(tmp_path: Path, content: bytes) -> None:
    path = written(tmp_path, content)
    attempt(lambda: read_options([str(LAUNCH / "train_ddpm.py"), "--cluster", str(path)]))


@examples(25)
@given(content=damaged((FOLDER / "week2_vae.yaml").read_bytes()))
def test_a_damaged_exercise(tmp_path: Path, content: bytes) -> None:
    path = written(tmp_path, content)
    attempt(lambda: read_plan(path, "small"), path)


@examples(15)
@given(content=damaged((CONFIGS / "ddpm_tiny.yaml").read_bytes()))
def test_a_damaged_configuration(tmp_path: Path, content: bytes) -> None:
    path = written(tmp_path, content)
    attempt(lambda: parse(Config, "", ["--config", str(path)]))


@examples(25)
@given(content=changed(TINY["diffusion"]))
def test_a_configuration_with_changed_values(tmp_path: Path, content: dict) -> None:
    path = written(tmp_path, yaml_io.write_yaml(content).encode())
    attempt(lambda: parse(Config, "", ["--config", str(path)]))
