"""`launch/report.py`: the page of a trained run, and mistakes in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import LAUNCH, SCRIPTS, TINY
from warm_processes import Result
from written_runs import write_run


@pytest.fixture
def report(run_warm: Callable) -> Callable[..., Result]:
    return lambda *words: run_warm(LAUNCH / "report.py", *words)


def test_page_lies_in_the_run_folder_by_default(report: Callable, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", [2.0, 1.0], settings={"diffusion": {"num_timesteps": 100}})
    for _ in range(2):  # the second replaces the first
        assert report(folder).stdout == f"1 run: {folder}/report.html\n"
        page = (folder / "report.html").read_text()
        assert "<td>diffusion.num_timesteps</td><td>100</td><td>1000</td>" in page


def test_a_sweep_with_a_failure_and_a_damaged_run(report: Callable, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_run(tmp_path / name, [2.0, 1.0])
    (write_run(tmp_path / "c", [2.0, 1.0]) / "config.yaml").write_text("a: [")
    (tmp_path / "d" / "slurm").mkdir(parents=True)
    (tmp_path / "d" / "slurm" / "job.json").write_text("{}")
    assert report(tmp_path).stdout == f"2 runs: {tmp_path}/report.html\n"
    page = (tmp_path / "report.html").read_text()
    assert "training never began" in page and "c/config.yaml is not valid YAML (line 1" in page


def test_runs_of_the_same_name_are_shown_with_their_folders(
    report: Callable, tmp_path: Path
) -> None:
    one, two = (write_run(tmp_path / name / "run", [2.0, 1.0]) for name in ("x", "y"))
    out = tmp_path / "both.html"
    assert report(one, two, one, "--out", out).stdout == f"2 runs: {out}\n"
    assert "x/run: min" in out.read_text() and "y/run: min" in out.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["diffusion", "gan"])
def test_page_of_a_trained_run(
    family: str, report: Callable, train: Callable, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    assert train(family=family).code == 0
    done = report(folder)
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
