"""`launch/report.py`: the page of a trained run, and mistakes in one line."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import SCRIPTS, TINY
from written_runs import write_run

import shards.cli
from dgm.cli import entry, report
from dgm.cli.entry import run

ROOT = Path(__file__).parents[2]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable:
    """Return a function that runs the script in this process: exit code, output, errors."""

    def called(*words: object) -> tuple[int | str | None, str, str]:
        monkeypatch.setattr(sys, "argv", ["report.py", *map(str, words)])
        # `run` ends a process, which it may leave as it likes; this one goes on.
        monkeypatch.setattr(shards.cli, "_option_format", str)
        monkeypatch.setattr(entry, "_is_script", False)
        monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
        with pytest.raises(SystemExit) as left:
            run(report.main)
        output = capsys.readouterr()
        return left.value.code, output.out, output.err

    return called


def test_page_lies_in_the_run_folder_by_default(call: Callable, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", [2.0, 1.0], settings={"diffusion": {"num_timesteps": 100}})
    assert call(folder) == (0, f"1 run: {folder}/report.html\n", "")
    page = (folder / "report.html").read_text()
    assert "<td>diffusion.num_timesteps</td><td>100</td><td>1000</td>" in page
    assert call(folder)[0] == 0  # once more, over the first


def test_a_sweep_with_a_failure_and_a_damaged_run(call: Callable, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_run(tmp_path / name, [2.0, 1.0])
    (write_run(tmp_path / "c", [2.0, 1.0]) / "config.yaml").write_text("a: [")
    (tmp_path / "d" / "slurm").mkdir(parents=True)
    (tmp_path / "d" / "slurm" / "job.json").write_text("{}")
    assert call(tmp_path)[:2] == (0, f"2 runs: {tmp_path}/report.html\n")
    page = (tmp_path / "report.html").read_text()
    assert "training never began" in page and "c/config.yaml is not YAML in line 1" in page


def test_runs_of_the_same_name_are_shown_with_their_folders(call: Callable, tmp_path: Path) -> None:
    one, two = (write_run(tmp_path / name / "run", [2.0, 1.0]) for name in ("x", "y"))
    out = tmp_path / "both.html"
    assert call(one, two, one, "--out", out)[:2] == (0, f"2 runs: {out}\n")
    assert "x/run: min" in out.read_text() and "y/run: min" in out.read_text()


def test_what_is_no_run_or_damaged_is_a_one_line_error(call: Callable, tmp_path: Path) -> None:
    empty, none = tmp_path / "empty", tmp_path / "none"
    empty.mkdir()
    config = write_run(tmp_path / "config", [1.0]) / "config.yaml"
    config.write_text("a: [")
    damaged = write_run(tmp_path / "damaged", [2.0, 1.0, 1.0]) / "metrics.jsonl"
    damaged.write_text(damaged.read_text().replace('"images_seen": 200', '"images": 200'))
    hint = "runs/ holds no run: train one first, or give the path of one"
    mistakes: dict[Path, str] = {
        none: f"{none} is no folder: {hint}",
        empty: f"{empty} is neither a run folder (no config.yaml) nor that of a sweep "
        f"(no run folder in it): {hint}",
        config.parent: f"{config} is not YAML in line 1 (did not find expected node content): "
        "correct that line; or restore it, or move the run",
        damaged.parent: f"{damaged} is damaged in line 2 (no JSON object with images_seen): "
        "repair or remove that line",
    }
    for folder, message in mistakes.items():
        assert call(folder) == (2, "", f"error: {message}\n"), folder
    assert not list(tmp_path.rglob("*.html"))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["diffusion", "gan"])
def test_page_of_a_trained_run(
    family: str, run_warm: Callable, tiny_configs: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    script = ROOT / "launch" / SCRIPTS[family]
    done = run_warm(script, "--config", tiny_configs[family], "--run.dir", folder)
    assert done.code == 0, done.stderr
    done = run_warm(ROOT / "launch" / "report.py", folder)
    assert done.code == 0, done.stderr
    page = (folder / "report.html").read_text()
    total = TINY[family]["train"]["total_images"]
    assert f"{total} of {total}" in page and "finished" in page
    minima = json.loads((folder / "minima.json").read_text())
    losses = [key for key in minima if key.split("/")[-1].startswith("loss")]
    assert len(losses) == (1 if family == "diffusion" else 4)
    for key in losses:
        lowest = minima[key]
        assert f"<figcaption>{key}</figcaption>" in page
        value = f"{lowest['value']:.4g}"
        assert f"min {value} after {lowest['images_seen']} images, last" in page
    assert f"launch/{SCRIPTS[family]} --config" in page and "data:image/png;base64," in page
