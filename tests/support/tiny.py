"""The smallest run of each family, `launch/configs/*_tiny.yaml`: sixteen steps, a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from dgm.cli.parser import TRAINERS

LAUNCH = Path(__file__).parents[2] / "launch"
BATCH = 16

SCRIPTS = {section: f"train_{name}.py" for section, name in TRAINERS.items()}

# The loss that represents a family.
LOSS = dict.fromkeys(SCRIPTS, "train/loss") | {"gan": "train/discriminator/loss"}


def _read(family: str) -> dict[str, Any]:
    return yaml.safe_load((LAUNCH / "configs" / f"{TRAINERS[family]}_tiny.yaml").read_text())


TINY: dict[str, dict[str, Any]] = {family: _read(family) for family in SCRIPTS}
