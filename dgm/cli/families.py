"""The family and the configuration of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dgm.cli.parser import TRAINERS, family_module, parse
from dgm.common.errors import UserError
from dgm.common.yaml_io import read_yaml


def family_of(path: Path) -> str:
    """Return the family of a run's config.yaml; raise UserError if there is not exactly one."""
    sections = read_yaml(path)
    found = [name for name in TRAINERS if name in sections]
    if len(found) != 1:
        raise UserError(
            f"{path} has {len(found)} of the sections {', '.join(TRAINERS)}: a run has one"
        )
    return found[0]


def open_config(path: Path) -> Any:
    """Read a run's config.yaml as the configuration of its family."""
    return parse(family_module(family_of(path)).Config, "", ["--config", str(path)])
