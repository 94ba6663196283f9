"""The published configurations: each is valid and explains its use."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from dgm.cli.families import FAMILIES
from dgm.cli.parser import parse

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "launch" / "configs").glob("*.yaml"))
NAMES = {"ddpm": "diffusion", "dcgan": "gan", "glow": "flow", "realnvp": "flow"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configuration_is_one_of_its_family_and_says_how_to_run_it(path: Path) -> None:
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any(line.startswith("# Command:") for line in header)
    assert any(line.startswith(("# Result:", "# Hardware:", "# Number:")) for line in header)
    name = path.stem.split("_")[0]
    parse(FAMILIES[NAMES.get(name, name)].Config, "", ["--config", str(path)])


@pytest.mark.parametrize("family", ["ddpm", "gan", "vae", "flow"])
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
