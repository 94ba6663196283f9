"""Scanning a WebDataset tar of anybody's: which samples, and where their bytes lie."""

from __future__ import annotations

import json
import mmap
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path

from shards.errors import ShardError
from shards.format import BLOCK

IMAGE_EXTENSIONS = ("npy", "png", "jpg", "jpeg", "webp")
LABEL_EXTENSIONS = ("cls", "label", "class", "cls.txt", "label.txt", "class.txt", "json")
_JSON_KEYS = ("label", "cls", "class", "class_id", "target")
_NAME = re.compile(r"^((?:.*/|)[^./]+)[.]([^/]*)$")  # as WebDataset splits key and extension


@dataclass(frozen=True)
class Member:
    """One file in a tar."""

    extension: str
    offset: int
    size: int


@dataclass(frozen=True)
class Sample:
    """One labelled image in a tar."""

    key: str
    image: Member
    label: Member


def scan_tar(path: Path) -> list[Sample]:
    """List the samples of a tar in order.

    Raises ShardError that names shard and key where a member is unsafe, a sample lacks its image
    or label, or the tar is compressed, damaged or truncated.
    """
    samples: dict[str, list[Member]] = {}
    previous = None
    for name, offset, size in _members(path):
        match = _NAME.match(name)
        if match is None or name.rpartition("/")[2].startswith("__"):
            continue  # WebDataset passes over these, too
        key, extension = match.group(1), match.group(2).lower()
        if key != previous and key in samples:
            raise ShardError(f"{path} holds key {key} twice; rename one of the samples")
        samples.setdefault(key, []).append(Member(extension, offset, size))
        previous = key
    if not samples:
        raise ShardError(f"{path} holds no samples; remove it")
    return [_sample(path, key, members) for key, members in samples.items()]


def read_label(content: bytes | mmap.mmap, member: Member, where: str) -> int | str:
    """Return the label of a sample: a number, or the name of a class.

    Raises ShardError with `where` in it where there is none.
    """
    value: object
    text = content[member.offset : member.offset + member.size]
    try:
        if member.extension.rpartition(".")[2] != "json":
            value = text.decode("utf-8").strip()
        else:
            fields = json.loads(text)
            found = [fields[key] for key in _JSON_KEYS if key in fields]
            value = found[0] if found and not isinstance(found[0], bool) else None
    except (ValueError, TypeError) as error:
        raise ShardError(f"{where} has an unreadable label ({error}); correct it") from None
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,9}", value):
        value = int(value)
    if value == "" or not isinstance(value, int | str) or (isinstance(value, int) and value < 0):
        keys = ", ".join(_JSON_KEYS)
        raise ShardError(f"{where} has no label (a number from 0, a name, or json with {keys})")
    return value


def _members(path: Path) -> list[tuple[str, int, int]]:
    """List (name, offset, size) of the files in a tar."""
    found = []
    size = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                _check_safe(path, info.name)
                if info.isreg():
                    found.append((info.name, info.offset_data, info.size))
                    if info.offset_data + info.size > size:
                        raise ShardError(f"{path} is truncated in {info.name}; get it again")
                tar.members = []  # type: ignore[attr-defined]  # bounds memory
            end = tar.offset
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        if isinstance(error, ShardError):
            raise
        raise ShardError(
            f"{path} is no plain tar, or a truncated one ({error}); get it again, uncompressed"
        ) from None
    _check_end(path, end)
    return found


def _check_end(path: Path, end: int) -> None:
    # tarfile takes any damage between two members for the end of the archive.
    with path.open("rb") as stream:
        stream.seek(end)
        block = stream.read(BLOCK)
    if len(block) < BLOCK:
        raise ShardError(f"{path} is truncated: no end-of-archive mark; get it again")
    if any(block):
        raise ShardError(f"{path} is damaged at byte {end}; get it again")


def _check_safe(path: Path, name: str) -> None:
    if name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name):
        raise ShardError(f"{path} holds the unsafe member {name}; remove it from the tar")


def _sample(path: Path, key: str, members: list[Member]) -> Sample:
    images = [m for m in members if m.extension.rpartition(".")[2] in IMAGE_EXTENSIONS]
    labels = [m for wanted in LABEL_EXTENSIONS for m in members if _is_label(m, wanted)]
    if not images:
        known = ", ".join(IMAGE_EXTENSIONS)
        raise ShardError(f"{path}: sample {key} has no image ({known}); add it or remove {key}")
    if len(images) > 1:
        names = ", ".join(m.extension for m in images)
        raise ShardError(f"{path}: sample {key} has several images ({names}); keep one")
    if not labels:
        known = ", ".join(LABEL_EXTENSIONS)
        raise ShardError(f"{path}: sample {key} has no label ({known}); add it or remove {key}")
    return Sample(key, images[0], labels[0])


def _is_label(member: Member, wanted: str) -> bool:
    return member.extension == wanted or member.extension.endswith("." + wanted)
