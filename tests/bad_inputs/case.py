"""A bad input: a command, what is prepared for it, and what its line has to hold."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Prepare = Callable[[Path], None]
HUGE = "1" + 30 * "0"


@dataclass(frozen=True)
class Case:
    """A command, and what its line has to hold."""

    command: str
    thing: str
    value: str
    remedy: str
    prepare: Prepare | None = None  # in the folder in which the command runs
    without_rights: bool = False  # as a user whom modes of files bind
    needs: str = ""  # a run or shards that `prepare` copies
    slow: bool = False


def train(family: str, options: str, thing: str, value: str, remedy: str, **more) -> Case:
    """Make a case of a trainer with its smallest configuration, whose run.dir is `new`."""
    command = f"python launch/train_{family}.py --config {family}.yaml {options}"
    return Case(command, thing, value, remedy, **more)


def written(name: str, text: str | bytes, mode: int | None = None) -> Prepare:
    """Give what writes a file."""

    def write(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        if mode is not None:
            path.chmod(mode)

    return write


def made(name: str, mode: int = 0o755) -> Prepare:
    """Give what makes a folder."""

    def make(folder: Path) -> None:
        (folder / name).mkdir(parents=True)
        (folder / name).chmod(mode)

    return make


def copied(source: str, target: str, change: Prepare | None = None) -> Prepare:
    """Give what copies a folder and changes the copy."""

    def copy(folder: Path) -> None:
        shutil.copytree(folder / source, folder / target)
        if change is not None:
            change(folder / target)

    return copy


def all_of(*prepares: Prepare) -> Prepare:
    """Give what does several things."""

    def do(folder: Path) -> None:
        for prepare in prepares:
            prepare(folder)

    return do


def emptied(folder: Path) -> None:
    """Take the checkpoints away from a run."""
    shutil.rmtree(folder / "checkpoints")


def flipped(pattern: str) -> Prepare:
    """Give what changes a byte in the middle of the first file of a pattern."""

    def flip(folder: Path) -> None:
        path = sorted(folder.glob(pattern))[0]
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    return flip


def picture(name: str, side: int = 32) -> Prepare:
    """Give what draws a picture."""

    def draw(folder: Path) -> None:
        from PIL import Image

        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (side, side)).save(folder / name)

    return draw


def linked(name: str) -> Prepare:
    """Give what makes a link that leads to itself."""
    return lambda folder: os.symlink(name, folder / name)
