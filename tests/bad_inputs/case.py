"""Cases of bad input, and functions that prepare the folder in which a command runs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

HUGE = "1" + 30 * "0"
Preparation = Callable[[Path], None]
"""Creates files in a folder."""


@dataclass(frozen=True)
class Case:
    """A command, and fragments of its error message."""

    command: str
    thing: str
    value: str
    remedy: str
    prepare: Preparation | None = None
    without_rights: bool = False  # run without root's right to ignore file modes
    needs: str = ""  # a run or shards that `prepare` copies
    slow: bool = False


def train(family: str, options: str, thing: str, value: str, remedy: str, **more: Any) -> Case:
    """Return a case of a trainer with its smallest configuration, whose run.dir is `new`."""
    command = f"python launch/train_{family}.py --config {family}.yaml {options}"
    return Case(command, thing, value, remedy, **more)


def written(name: str, content: str | bytes, mode: int = 0o644) -> Preparation:
    """Return a preparation that writes a file."""

    def prepare(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        path.chmod(mode)

    return prepare


def made(name: str, mode: int = 0o755) -> Preparation:
    """Return a preparation that creates an empty folder."""

    def prepare(folder: Path) -> None:
        (folder / name).mkdir(parents=True)
        (folder / name).chmod(mode)

    return prepare


def copied(source: str, target: str, change: Callable[[Path], Any]) -> Preparation:
    """Return a preparation that copies a folder and changes the copy."""

    def prepare(folder: Path) -> None:
        shutil.copytree(folder / source, folder / target)
        change(folder / target)

    return prepare


def all_of(*preparations: Preparation) -> Preparation:
    """Return a preparation that carries out several."""

    def prepare(folder: Path) -> None:
        for each in preparations:
            each(folder)

    return prepare


def flipped(pattern: str) -> Preparation:
    """Return a preparation that flips a bit in the middle of the first file that matches."""

    def prepare(folder: Path) -> None:
        path = sorted(folder.glob(pattern))[0]
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    return prepare


def picture(name: str, side: int = 32) -> Preparation:
    """Return a preparation that writes a black image."""

    def prepare(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (side, side)).save(folder / name)

    return prepare
