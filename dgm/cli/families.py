"""The families of models, by the section of the configuration that only they have."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from dgm.cli.parser import parse
from dgm.common.errors import UserError
from dgm.common.yaml_io import read_yaml

if TYPE_CHECKING:
    from dgm.cli.assemble import Parts


class _Modules(Mapping[str, ModuleType]):
    """Modules by name, each imported on access, because they import torch."""

    def __init__(self, names: dict[str, str]):
        self._names = names

    def __getitem__(self, key: str) -> ModuleType:
        return importlib.import_module(self._names[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


FAMILIES = _Modules(
    {
        "diffusion": "dgm.cli.train_ddpm",
        "gan": "dgm.cli.train_gan",
        "vae": "dgm.cli.train_vae",
        "flow": "dgm.cli.train_flow",
    }
)


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
