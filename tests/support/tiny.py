"""The smallest run of each family, `launch/configs/*_tiny.yaml`: sixteen steps, a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

LAUNCH = Path(__file__).parents[2] / "launch"
BATCH = 16

SCRIPTS = {
    "diffusion": "train_ddpm.py",
    "gan": "train_gan.py",
    "vae": "train_vae.py",
    "flow": "train_flow.py",
}

# The loss that represents a family.
LOSS = {
    "diffusion": "train/loss",
    "gan": "train/discriminator/loss",
    "vae": "train/loss",
    "flow": "train/loss",
}


def _read(family: str) -> dict[str, Any]:
    name = SCRIPTS[family].removeprefix("train_").removesuffix(".py")
    return yaml.safe_load((LAUNCH / "configs" / f"{name}_tiny.yaml").read_text())


TINY: dict[str, dict[str, Any]] = {family: _read(family) for family in SCRIPTS}
