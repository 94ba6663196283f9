"""The published configurations: each is valid and explains its use."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dgm.cli.parser import TRAINERS, family_module, parse

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "launch" / "configs").glob("*.yaml"))
NAMES = {"ddpm": "diffusion", "dcgan": "gan", "glow": "flow", "realnvp": "flow"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configuration_is_one_of_its_family_and_says_how_to_run_it(path: Path) -> None:
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any(line.startswith("# Command:") for line in header)
    assert any(line.startswith(("# Result:", "# Hardware:", "# Number:")) for line in header)
    name = path.stem.split("_")[0]
    parse(family_module(NAMES.get(name, name)).Config, "", ["--config", str(path)])


@pytest.mark.parametrize("family", TRAINERS.values())
@pytest.mark.parametrize(
    ("data", "ending"), [("shapes", ""), ("cifar10", "_cifar10"), ("folder:x", "_cifar10")]
)
def test_make_train_takes_the_configuration_that_suits_the_images(
    family: str, data: str, ending: str
) -> None:
    words = ["make", "-n", "train", f"MODEL={family}", f"DATA={data}"]
    output = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    config = f"launch/configs/{family}_small{ending}.yaml"
    assert f"--config {config} " in output and (ROOT / config).is_file()
    assert f'--data.source "{data}"' in output


@pytest.mark.slow
def test_an_installed_wheel_finds_its_configurations_by_name(tmp_path: Path) -> None:
    project, site = tmp_path / "project", tmp_path / "site"
    project.mkdir()
    shutil.copy(ROOT / "pyproject.toml", project)
    for name in ("dgm", "shards", "slurm", "launch"):
        shutil.copytree(ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", site, project], check=True)
    words = [sys.executable, site / "bin" / "dgm", "train", "ddpm", "--config=ddpm_tiny.yaml"]
    done = subprocess.run(
        [*words, "--print_config"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "channels: 8" in done.stdout, done.stderr
    installed = {str(path.relative_to(site)) for path in (site / "launch").rglob("*.yaml")}
    assert installed == {str(path.relative_to(ROOT)) for path in (ROOT / "launch").rglob("*.yaml")}
