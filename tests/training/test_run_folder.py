"""The run folder: which configurations may continue in it."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from dgm.common.config_keys import MAY_CHANGE, flatten, marked_keys
from dgm.common.errors import UserError
from dgm.training.engine import Engine
from dgm.training.run_folder import RunConfig, RunFolder, record_start


@dataclass(frozen=True)
class Section:
    widths: list[int] = field(default_factory=lambda: [1, 2])
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    name: str | None = None
    cadence: int = field(default=10, metadata=MAY_CHANGE)


@dataclass(frozen=True)
class Config:
    seed: int = 0
    model: Section = field(default_factory=Section)
    sample: Section = field(default_factory=Section, metadata=MAY_CHANGE)


def text_of(folder: Path) -> str:
    return (folder / "config.yaml").read_text()


def start(config: object, folder: Path) -> dict[str, list[Any]]:
    """Open a run folder and write its configuration, as the trainer does."""
    opened = RunFolder(config, folder)
    changed = opened.open()
    opened.write_config()
    return changed


def train_in(folder: Path, config: object) -> None:
    """Make a run that has logged a step."""
    start(config, folder)
    (folder / "metrics.jsonl").write_text('{"step": 1, "images_seen": 8}\n')


def test_settings_are_flattened_with_what_may_change():
    found, free = flatten(Config()), marked_keys(Config(), MAY_CHANGE)
    assert found["seed"] == 0 and "seed" not in free
    assert found["model.betas"] == [0.9, 0.999] and "model.betas" not in free
    assert found["model.cadence"] == 10 and "model.cadence" in free
    assert found["sample.eps"] == 1e-8 and "sample.eps" in free  # as the whole section
    assert len(found) == 11


def test_a_new_run_has_its_whole_configuration_and_continues(tmp_path: Path):
    folder = tmp_path / "runs" / "one"
    config = Config(model=Section(eps=3e-16, name="a: [b] 'c'"))
    assert start(config, folder) == {}
    assert os.listdir(folder) == ["config.yaml"]
    before = text_of(folder)
    written = yaml.safe_load(before)
    assert list(written) == ["seed", "model", "sample"]
    section = {"widths": [1, 2], "betas": [0.9, 0.999], "eps": 1e-8, "name": None, "cadence": 10}
    assert written["sample"] == section
    assert start(config, folder) == {}
    assert text_of(folder) == before


def test_each_fixed_key_that_differs_is_named_with_both_values(tmp_path: Path):
    train_in(tmp_path, Config())
    text = text_of(tmp_path)
    changed = Section(widths=[1, 3], betas=(0.5, 0.9), eps=1e-6, name="x", cadence=5)
    with pytest.raises(UserError, match=re.escape(str(tmp_path))) as caught:
        start(Config(1, changed, Section(name="free")), tmp_path)
    assert (
        "(seed was 0, is 1; model.widths was [1, 2], is [1, 3]; "
        "model.betas was [0.9, 0.999], is [0.5, 0.9]; model.eps was 1e-08, is 1e-06; "
        "model.name was None, is 'x')"
    ) in str(caught.value)
    assert text_of(tmp_path) == text


def test_a_free_key_may_change_and_is_written_when_the_run_starts(tmp_path: Path):
    train_in(tmp_path, Config())
    before = text_of(tmp_path)
    other = replace(Config(), model=Section(cadence=7), sample=Section(betas=(0.1, 0.2)))
    opened = RunFolder(other, tmp_path)
    assert opened.open() == {
        "model.cadence": [10, 7],
        "sample.betas": [[0.9, 0.999], [0.1, 0.2]],
    }
    assert text_of(tmp_path) == before
    opened.write_config()
    assert yaml.safe_load(text_of(tmp_path))["model"]["cadence"] == 7
    assert start(other, tmp_path) == {}


def test_a_key_that_an_older_version_did_not_write_has_its_default(tmp_path: Path):
    train_in(tmp_path, Config())
    path, whole = tmp_path / "config.yaml", text_of(tmp_path)
    older = "".join(line for line in whole.splitlines(True) if "eps" not in line)
    path.write_text(older)
    with pytest.raises(UserError, match=r"model\.eps was 1e-08, is 1e-06"):
        start(Config(model=Section(eps=1e-6)), tmp_path)
    assert text_of(tmp_path) == older
    assert start(Config(), tmp_path) == {}
    assert text_of(tmp_path) == whole


def test_another_configuration_may_start_where_nothing_was_trained(tmp_path: Path):
    start(Config(), tmp_path)
    (tmp_path / "metrics.jsonl").touch()
    assert start(Config(seed=1), tmp_path) == {"seed": [0, 1]}
    assert yaml.safe_load(text_of(tmp_path))["seed"] == 1
    (tmp_path / "config.yaml").write_text(text_of(tmp_path).replace("model:", "gan:"))
    assert start(Config(), tmp_path) == {}
    assert "gan" not in text_of(tmp_path)


def test_a_new_folder_is_removed_if_nothing_was_trained(tmp_path: Path):
    new, existing, trained = (
        RunFolder(Config(), tmp_path / name) for name in ("new", "existing", "trained")
    )
    existing.path.mkdir()
    for made in (new, existing, trained):
        made.open()
        made.write_config()
        (made.path / "tensorboard").mkdir()
    (trained.path / "metrics.jsonl").write_text("{}\n")
    for made in (new, existing, trained):
        made.discard()
    assert sorted(os.listdir(tmp_path)) == ["existing", "trained"]
    assert (trained.path / "metrics.jsonl").exists()


def test_a_configuration_of_another_version_is_refused(tmp_path: Path):
    train_in(tmp_path, Config())
    (tmp_path / "config.yaml").write_text(text_of(tmp_path) + "forgotten: 5\n")
    with pytest.raises(UserError, match="forgotten was 5, which this version does not know"):
        start(Config(), tmp_path)


@dataclass(frozen=True)
class Whole(Config):
    run: RunConfig = field(default_factory=RunConfig)


def test_the_configuration_of_something_else_is_refused_and_not_changed(tmp_path: Path):
    (tmp_path / "config.yaml").write_text("site: mine\nseed: 0\n")
    with pytest.raises(UserError, match=r"holds no run: its config\.yaml was not"):
        start(Whole(), tmp_path)
    assert text_of(tmp_path) == "site: mine\nseed: 0\n"


def test_a_start_that_was_killed_while_writing_can_be_repeated(tmp_path: Path):
    (tmp_path / ".config.yaml.tmp").write_text("seed: 0\nmod")
    assert start(Config(), tmp_path) == {}
    assert os.listdir(tmp_path) == ["config.yaml"]


def test_a_truncated_configuration_is_never_taken_for_another(tmp_path: Path):
    train_in(tmp_path, Config())
    path, whole = tmp_path / "config.yaml", text_of(tmp_path)
    other = Config(1, Section(widths=[3], betas=(0.5, 0.9), eps=1e-6, name="x"))
    for length in range(len(whole)):
        path.write_text(whole[:length])
        with pytest.raises(UserError):
            start(other, tmp_path)
        try:
            changed = start(Config(), tmp_path)
        except UserError:
            continue
        # The cut took keys that may change, or that have their defaults.
        assert all(k.startswith("sample.") or k == "model.cadence" for k in changed)
        assert text_of(tmp_path) == whole


@pytest.mark.parametrize("content", [b"", b"text", b"a: [", b"\xff\xfe\x00", b"- 1\n"])
def test_an_unreadable_configuration_is_named(tmp_path: Path, content: bytes):
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"config\.yaml .*: .*or move the run"):
        start(Config(), tmp_path)


def test_each_start_is_recorded(tmp_path: Path, engine: Engine):
    record_start(tmp_path, engine, 0, {})
    record_start(tmp_path, engine, 640, {"train.total_images": [100, 200]})
    starts = [json.loads(line) for line in (tmp_path / "starts.jsonl").read_text().splitlines()]
    assert [start["images_seen"] for start in starts] == [0, 640]
    assert starts[1]["changed"] == {"train.total_images": [100, 200]}
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["world_size"] == environment["num_nodes"] == 1
    assert environment["engine"] == "one process" and "git_commit" in environment
    assert "torch" in environment["versions"] and environment["devices"]
