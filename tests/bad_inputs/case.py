"""A bad input: a command, what is prepared for it, and what its line has to hold."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HUGE = "1" + 30 * "0"
_SHOWN = 60  # letters of a file


@dataclass(frozen=True)
class Preparation:
    """What is made in a folder before a command runs there."""

    told: str  # to people
    make: Callable[[Path], None]


@dataclass(frozen=True)
class Case:
    """A command, and what its line has to hold."""

    command: str
    thing: str
    value: str
    remedy: str
    prepare: Preparation | None = None
    without_rights: bool = False  # as a user whom modes of files bind
    needs: str = ""  # a run or shards that `prepare` copies
    slow: bool = False

    @property
    def shown(self) -> str:
        """Give the command, and what was prepared."""
        where = "" if self.prepare is None else f", where {self.prepare.told}"
        return f"`{self.command}`{where}"


def train(family: str, options: str, thing: str, value: str, remedy: str, **more: Any) -> Case:
    """Make a case of a trainer with its smallest configuration, whose run.dir is `new`."""
    command = f"python launch/train_{family}.py --config {family}.yaml {options}"
    return Case(command, thing, value, remedy, **more)


def written(name: str, text: str | bytes, mode: int | None = None) -> Preparation:
    """Write a file."""

    def make(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        if mode is not None:
            path.chmod(mode)

    held = " ".join(text.split()) if isinstance(text, str) else "all bytes"
    held = f"holds `{held[:_SHOWN]}{'...' * (len(held) > _SHOWN)}`" if held else "is empty"
    return Preparation(f"{name} {'may not be read' if mode == 0 else held}", make)


def made(name: str, mode: int = 0o755) -> Preparation:
    """Make a folder."""

    def make(folder: Path) -> None:
        (folder / name).mkdir(parents=True)
        (folder / name).chmod(mode)

    empty = "is an empty folder" if mode & 0o200 else "may not be written to"
    return Preparation(f"{name} {empty}", make)


def copied(source: str, target: str, told: str, change: Callable[[Path], None]) -> Preparation:
    """Copy a folder and change the copy."""

    def make(folder: Path) -> None:
        shutil.copytree(folder / source, folder / target)
        change(folder / target)

    return Preparation(f"{target} is {source} {told}", make)


def all_of(*prepares: Preparation) -> Preparation:
    """Do several things."""

    def make(folder: Path) -> None:
        for prepare in prepares:
            prepare.make(folder)

    return Preparation(" and ".join(prepare.told for prepare in prepares), make)


def emptied(folder: Path) -> None:
    """Take the checkpoints away from a run."""
    shutil.rmtree(folder / "checkpoints")


def flipped(pattern: str) -> Callable[[Path], None]:
    """Give what changes a bit in the middle of the first file of a pattern."""

    def flip(folder: Path) -> None:
        path = sorted(folder.glob(pattern))[0]
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    return flip


def picture(name: str, side: int = 32) -> Preparation:
    """Draw a picture."""

    def make(folder: Path) -> None:
        from PIL import Image

        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (side, side)).save(folder / name)

    return Preparation(f"{name} is of side {side}", make)


def linked(name: str) -> Preparation:
    """Make a link that leads to itself."""
    return Preparation(f"{name} is a link to itself", lambda f: (f / name).symlink_to(name))
