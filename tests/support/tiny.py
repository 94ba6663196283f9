"""The smallest run of each family, `launch/configs/*_tiny.yaml`: sixteen steps, a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from shards import shapes

LAUNCH = Path(__file__).parents[2] / "launch"
BATCH = 16
NUM_IMAGES = 320  # twenty steps

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


def write_shapes(root: Path) -> Path:
    """Write images of shapes, one folder per class, and return their folder."""
    for index in range(NUM_IMAGES):
        folder = root / shapes.CLASSES[index % len(shapes.CLASSES)]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(shapes.render("train", index)).save(folder / f"{index:04d}.png")
    return root
