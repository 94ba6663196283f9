"""Scanning a WebDataset tar of anybody's: which samples, and where their bytes lie."""

from __future__ import annotations

import json
import mmap
import re
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import BinaryIO, cast

from dgm.common.errors import UserError
from shards.format import BLOCK

IMAGE_EXTENSIONS = ("npy", "png", "jpg", "jpeg", "webp")
LABEL_EXTENSIONS = ("cls", "label", "class", "cls.txt", "label.txt", "class.txt", "json")
_JSON_KEYS = ("label", "cls", "class", "class_id", "target")
_MAX_HEADER = 2**20
_MAX_LABEL = 2**20
# First bytes, endings, and the program that unpacks it.
_PACKED = (
    (b"\x1f\x8b", (".gz", ".tgz"), "gzip"),
    (b"\x28\xb5\x2f\xfd", (".zst", ".tzst"), "zstd"),
    (b"\xfd7zXZ\0", (".xz", ".txz"), "xz"),
    (b"BZh", (".bz2", ".tbz2"), "bzip2"),
    (b"PK\3\4", (".zip",), "unzip"),
)
PACKED_ENDINGS = tuple(ending for _, endings, _ in _PACKED for ending in endings)
_ENDING = re.compile(r"(\.tar)?(\.(gz|zst|xz|bz2|tgz|tzst|txz|tbz2|zip))?$", re.IGNORECASE)
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


def scan_tar(path: Path, scattered: Callable[[str], None] = lambda key: None) -> list[Sample]:
    """List the samples of a tar, each all members of one key, in the order of their first ones.

    `scattered` is called with the first key whose members do not follow each other. Raises
    UserError that names shard and key where a member is unsafe or there twice, a sample lacks its
    image or label, or the tar is compressed, damaged or truncated.
    """
    samples: dict[str, list[Member]] = {}
    previous = apart = None
    for name, offset, size in _members(path):
        match = _NAME.match(name)
        if match is None or name.rpartition("/")[2].startswith("__"):
            continue  # WebDataset passes over these, too
        key, extension = match.group(1), match.group(2).lower()
        members = samples.setdefault(key, [])
        if any(member.extension == extension for member in members):
            raise UserError(f"{path} holds {name} twice; rename or remove one of them")
        if members and key != previous and apart is None:
            apart = key
        members.append(Member(extension, offset, size))
        previous = key
    if not samples:
        raise UserError(f"{path} holds no samples; remove it")
    found = [_sample(path, key, members) for key, members in samples.items()]
    if apart is not None:
        scattered(apart)
    return found


def read_label(content: bytes | mmap.mmap, member: Member, where: str) -> int | str:
    """Return the label of a sample: a number, or the name of a class.

    Raises UserError with `where` in it where there is none.
    """
    value: object
    if member.size > _MAX_LABEL:
        raise UserError(f"{where} has a label of {member.size:,} bytes; correct it")
    text = content[member.offset : member.offset + member.size]
    try:
        if member.extension.rpartition(".")[2] != "json":
            value = text.decode("utf-8").strip()
        else:
            fields = json.loads(text)
            found = [fields[key] for key in _JSON_KEYS if key in fields]
            value = found[0] if found and not isinstance(found[0], bool) else None
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{where} has an unreadable label ({error}); correct it") from None
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,19}", value) and int(value) < 2**63:
        value = int(value)
    if isinstance(value, int) and value >= 2**63:
        raise UserError(f"{where} has label {value}; give numbers below 2**63, or names")
    if value == "" or not isinstance(value, int | str) or (isinstance(value, int) and value < 0):
        keys = ", ".join(_JSON_KEYS)
        raise UserError(f"{where} has no label (a number from 0, a name, or json with {keys})")
    return value


def _members(path: Path) -> list[tuple[str, int, int]]:
    """List (name, offset, size) of the files in a tar."""
    found = []
    size = path.stat().st_size
    previous = -1
    try:
        with (
            path.open("rb") as stream,
            tarfile.open(fileobj=cast(BinaryIO, _Headers(stream)), mode="r:") as tar,
        ):
            for info in tar:
                _check_member(path, info)
                if info.offset <= previous:
                    raise UserError(f"{path} is damaged at byte {previous}; get it again")
                previous = info.offset
                if info.isreg():
                    found.append((info.name, info.offset_data, info.size))
                    if info.offset_data + info.size > size:
                        raise UserError(f"{path} is truncated in {info.name}; get it again")
                tar.members = []  # type: ignore[attr-defined]  # bounds memory
            end = tar.offset
    except (
        tarfile.TarError,
        EOFError,
        OSError,
        ValueError,
        OverflowError,
        RecursionError,
    ) as error:
        if isinstance(error, UserError):
            raise
        if (remedy := how_to_unpack(path)) is not None:
            raise UserError(f"{path} is no plain tar, but compressed; {remedy}") from None
        raise UserError(
            f"{path} is no plain tar, or a truncated one ({error}); get it again, uncompressed"
        ) from None
    _check_end(path, end)
    return found


def how_to_unpack(path: Path) -> str | None:
    """Return what to do with an archive that is no plain tar, with a command; None for others."""
    try:
        with path.open("rb") as stream:
            start = stream.read(8)
    except OSError:
        start = b""
    for magic, ending, program in _PACKED:
        if start.startswith(magic) or (not start and path.name.lower().endswith(ending)):
            name = _ENDING.sub("", path.name) or path.name
            if program == "unzip":
                folder = path.with_name(name if name != path.name else f"{name}-unpacked")
                return f"unpack it by: unzip {quote(str(path))} -d {quote(str(folder))}"
            plain = f"{name}.tar" if f"{name}.tar" != path.name else f"{name}.plain.tar"
            to = quote(str(path.with_name(plain)))
            return f"unpack it by: {program} -dc {quote(str(path))} > {to}"
    return None


class _Headers:
    """A stream for reading headers only, none of which may ask for much memory."""

    def __init__(self, stream: BinaryIO):
        self.seek, self.tell, self._read = stream.seek, stream.tell, stream.read

    def read(self, size: int) -> bytes:
        """Read a header, or the long name or the fields that one announces."""
        if not 0 <= size <= _MAX_HEADER:
            raise ValueError(f"a header of {size} bytes at byte {self.tell()}")
        return self._read(size)


def _check_end(path: Path, end: int) -> None:
    # tarfile takes any damage between two members for the end of the archive.
    with path.open("rb") as stream:
        stream.seek(end)
        block = stream.read(BLOCK)
        if len(block) < BLOCK:
            raise UserError(f"{path} is truncated: no end-of-archive mark; get it again")
        while block:
            if rest := block.lstrip(b"\0"):
                at = end if stream.tell() == end + BLOCK else stream.tell() - len(rest)
                raise UserError(f"{path} is damaged at byte {at}; get it again")
            block = stream.read(_MAX_HEADER)


def _check_member(path: Path, info: tarfile.TarInfo) -> None:
    name, at = info.name, f"byte {info.offset}"
    if name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name):
        raise UserError(f"{path} holds the unsafe member {name} at {at}; remove it from the tar")
    if any(ord(letter) < 32 or ord(letter) == 127 for letter in name):
        raise UserError(f"{path} holds the unsafe member {name!r} at {at}; remove it from the tar")
    if info.size < 0:
        raise UserError(f"{path} is damaged at {at}; get it again")
    if info.issparse() or not (info.isreg() or info.isdir()):
        raise UserError(
            f"{path} holds {name} at {at}, a link, a device or a sparse file; store plain files"
        )


def _sample(path: Path, key: str, members: list[Member]) -> Sample:
    images = [m for m in members if m.extension.rpartition(".")[2] in IMAGE_EXTENSIONS]
    labels = [m for wanted in LABEL_EXTENSIONS for m in members if _is_label(m, wanted)]
    if not images:
        known = ", ".join(IMAGE_EXTENSIONS)
        raise UserError(f"{path}: sample {key} has no image ({known}); add it or remove {key}")
    if len(images) > 1:
        names = ", ".join(m.extension for m in images)
        raise UserError(f"{path}: sample {key} has several images ({names}); keep one")
    if not labels:
        known = ", ".join(LABEL_EXTENSIONS)
        raise UserError(f"{path}: sample {key} has no label ({known}); add it or remove {key}")
    return Sample(key, images[0], labels[0])


def _is_label(member: Member, wanted: str) -> bool:
    return member.extension == wanted or member.extension.endswith("." + wanted)
