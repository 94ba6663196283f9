"""Indexing a WebDataset tar of any origin: its samples and the offsets of their members."""

from __future__ import annotations

import json
import mmap
import re
import tarfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import BinaryIO, cast

from dgm.common.errors import UserError
from shards.format import BLOCK

IMAGE_EXTENSIONS = ("npy", "png", "jpg", "jpeg", "webp")
LABEL_EXTENSIONS = ("cls", "label", "class", "cls.txt", "label.txt", "class.txt", "json")
_JSON_KEYS = ("label", "cls", "class", "class_id", "target")
_TAR_ERRORS = (tarfile.TarError, EOFError, OSError, ValueError, OverflowError, RecursionError)
_MAX_HEADER = 2**20
_MAX_LABEL = 2**20
# Of each archive format: first bytes, suffixes, and the program that unpacks it.
_ARCHIVES = (
    (b"\x1f\x8b", (".gz", ".tgz"), "gzip"),
    (b"\x28\xb5\x2f\xfd", (".zst", ".tzst"), "zstd"),
    (b"\xfd7zXZ\0", (".xz", ".txz"), "xz"),
    (b"BZh", (".bz2", ".tbz2"), "bzip2"),
    (b"PK\3\4", (".zip",), "unzip"),
)
ARCHIVE_SUFFIXES = tuple(ending for _, endings, _ in _ARCHIVES for ending in endings)
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
    """One labeled image in a tar."""

    key: str
    image: Member
    label: Member


def index_tar(path: Path, warn: bool = True) -> list[Sample]:
    """Return the samples of a tar, in the order of their first members.

    warn: of samples whose members are not adjacent. Raise UserError with shard and key where a
    member is unsafe or duplicate, a sample lacks its image or label, or the tar is compressed,
    damaged or truncated.
    """
    samples: dict[str, list[Member]] = {}
    previous = scattered = None
    for name, offset, size in _members(path):
        match = _NAME.match(name)
        if match is None or name.rpartition("/")[2].startswith("__"):
            continue  # as in WebDataset
        key, extension = match.group(1), match.group(2).lower()
        members = samples.setdefault(key, [])
        if any(member.extension == extension for member in members):
            raise UserError(f"{path} holds {name} twice; rename or remove one of them")
        if members and key != previous and scattered is None:
            scattered = key
        members.append(Member(extension, offset, size))
        previous = key
    if not samples:
        raise UserError(f"{path} holds no samples; remove it")
    result = [_sample(path, key, members) for key, members in samples.items()]
    if scattered is not None and warn:
        warnings.warn(
            f"{path}: members of sample {scattered} are not adjacent, so WebDataset itself would "
            "not read it; sort them with tar --sort=name",
            stacklevel=2,
        )
    return result


def read_label(content: bytes | mmap.mmap, member: Member, where: str) -> int | str:
    """Return the label of a sample: a number, or the name of a class.

    Raise UserError if there is none; its message begins with `where`.
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
    """Return (name, offset, size) of the files in a tar."""
    members = []
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
                    raise UserError(f"{path} is damaged at byte {previous}; replace it")
                previous = info.offset
                if info.isreg():
                    members.append((info.name, info.offset_data, info.size))
                    if info.offset_data + info.size > size:
                        raise UserError(f"{path} is truncated in {info.name}; replace it")
                tar.members = []  # type: ignore[attr-defined]  # limits memory
            end = tar.offset
    except UserError:
        raise
    except _TAR_ERRORS as error:
        if (remedy := unpack_command(path)) is not None:
            raise UserError(f"{path} is compressed, not a plain tar; {remedy}") from None
        raise UserError(
            f"{path} is not a plain tar, or is truncated ({error}); replace it with a plain tar"
        ) from None
    _check_end(path, end)
    return members


def unpack_command(path: Path) -> str | None:
    """Return the remedy for an archive that is not a plain tar, with a command; None for others."""
    try:
        with path.open("rb") as stream:
            start = stream.read(8)
    except OSError:
        start = b""
    for magic, ending, program in _ARCHIVES:
        if start.startswith(magic) or (not start and path.name.lower().endswith(ending)):
            name = _ENDING.sub("", path.name) or path.name
            if program == "unzip":
                folder = path.with_name(name if name != path.name else f"{name}-unpacked")
                return f"unpack it with: unzip {quote(str(path))} -d {quote(str(folder))}"
            plain = f"{name}.tar" if f"{name}.tar" != path.name else f"{name}.plain.tar"
            to = quote(str(path.with_name(plain)))
            return f"unpack it with: {program} -dc {quote(str(path))} > {to}"
    return None


class _Headers:
    """A stream for reading tar headers, which limits the size of each."""

    def __init__(self, stream: BinaryIO):
        self.seek, self.tell, self._read = stream.seek, stream.tell, stream.read

    def read(self, size: int) -> bytes:
        """Read a header, or the long name or fields that follow one."""
        if not 0 <= size <= _MAX_HEADER:
            raise ValueError(f"a header of {size} bytes at byte {self.tell()}")
        return self._read(size)


def _check_end(path: Path, end: int) -> None:
    # tarfile ends silently at any damage between two members.
    with path.open("rb") as stream:
        stream.seek(end)
        block = stream.read(BLOCK)
        if len(block) < BLOCK:
            raise UserError(f"{path} is truncated: no end-of-archive mark; replace it")
        while block:
            if rest := block.lstrip(b"\0"):
                at = end if stream.tell() == end + BLOCK else stream.tell() - len(rest)
                raise UserError(f"{path} is damaged at byte {at}; replace it")
            block = stream.read(_MAX_HEADER)


def _check_member(path: Path, info: tarfile.TarInfo) -> None:
    name, at = info.name, f"byte {info.offset}"
    if name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name):
        raise UserError(f"{path} holds the unsafe member {name} at {at}; remove it from the tar")
    if any(ord(letter) < 32 or ord(letter) == 127 for letter in name):
        raise UserError(f"{path} holds the unsafe member {name!r} at {at}; remove it from the tar")
    if info.size < 0:
        raise UserError(f"{path} is damaged at {at}; replace it")
    if info.issparse() or not (info.isreg() or info.isdir()):
        raise UserError(
            f"{path} holds {name} at {at}, a link, a device or a sparse file; store plain files"
        )


def _sample(path: Path, key: str, members: list[Member]) -> Sample:
    images = [m for m in members if m.extension.rpartition(".")[2] in IMAGE_EXTENSIONS]
    labels = [m for e in LABEL_EXTENSIONS for m in members if f".{m.extension}".endswith(f".{e}")]
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
