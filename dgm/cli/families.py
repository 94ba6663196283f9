"""The model families, keyed by the configuration section that identifies each."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from dgm.cli.parser import TRAINERS, parse
from dgm.common.errors import UserError
from dgm.common.yaml_io import read_yaml


class _Families(Mapping[str, ModuleType]):
    """The modules `dgm.cli.train_*`, each imported on access, because they import torch."""

    def __getitem__(self, key: str) -> ModuleType:
        return importlib.import_module(f"dgm.cli.train_{TRAINERS[key]}")

    def __iter__(self) -> Iterator[str]:
        return iter(TRAINERS)

    def __len__(self) -> int:
        return len(TRAINERS)


FAMILIES = _Families()


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
