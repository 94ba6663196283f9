"""The families of models, by the section of the configuration that only they have."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

from dgm.cli import train_ddpm, train_flow, train_gan, train_vae
from dgm.cli.assemble import Parts
from dgm.cli.parser import parse
from dgm.common.errors import UserError
from dgm.common.yaml_io import read_yaml

FAMILIES: dict[str, ModuleType] = {
    "diffusion": train_ddpm,
    "gan": train_gan,
    "vae": train_vae,
    "flow": train_flow,
}


def family_of(path: Path) -> str:
    """Return the family of a run's config.yaml; raise UserError if there is not exactly one."""
    sections = read_yaml(path)
    found = [name for name in FAMILIES if name in sections]
    if len(found) != 1:
        raise UserError(
            f"{path} has {len(found)} of the sections {', '.join(FAMILIES)}: a run has one"
        )
    return found[0]


def open_config(path: Path) -> Any:
    """Read a run's config.yaml as the configuration of its family."""
    return parse(FAMILIES[family_of(path)].Config, "", ["--config", str(path)])


def rebuild(path: Path, image_shape: tuple[int, int, int], num_classes: int) -> tuple[str, Parts]:
    """Return the family of a run's config.yaml, and its nets and objective."""
    family = family_of(path)
    return family, FAMILIES[family].make_parts(open_config(path), image_shape, num_classes)
