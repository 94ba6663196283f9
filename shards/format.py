"""The format of shards on disk: `index.json` beside plain WebDataset tars.

The default image format is fixed stride: each sample is `KEY.cls` (the label as text) and
`KEY.npy` (uint8 [H, W, 3]), uncompressed, so that sample i lies at byte i * stride:

    | tar header | label, padded | tar header | npy header, pixels, padded |
    0            512             1024         1536                         stride

tar pads every member to blocks of 512 bytes, so labels of any number of digits keep the stride.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dgm.common.errors import UserError

VERSION = 1
INDEX = "index.json"
SOURCE_FILES = "source-files.jsonl"
"""File of a folder source: name, size and modification time of each image file."""
BLOCK = 512
IMAGE_FORMATS = ("npy", "png")
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Layout:
    """Offsets in a fixed-stride tar, in bytes."""

    stride: int
    """Distance from one sample to the next."""
    label_offset: int
    """From the start of a sample to its label (ASCII digits)."""
    pixel_offset: int
    """From the start of a sample to its pixels (uint8, H * W * 3)."""


@dataclass(frozen=True)
class ShardFile:
    """One tar as the index describes it."""

    name: str
    count: int
    size: int
    sha256: str


@dataclass(frozen=True)
class SourceFiles:
    """The image files that shards were built from."""

    count: int
    sha256: str
    """Of `source-files.jsonl`: class names; names, sizes and modification times of files."""


Setting = int | float | str


@dataclass(frozen=True)
class Index:
    """The content of `index.json`."""

    image_shape: tuple[int, int, int]
    """(H, W, 3)"""
    image_format: str
    """`npy` (fixed stride, read in place), or `png`, which is decoded once."""
    classes: tuple[str, ...]
    """Names in label order."""
    split: str
    source: str
    shards: tuple[ShardFile, ...]
    layout: Layout | None
    """None for shards that must be decoded."""
    settings: dict[str, Setting] = field(default_factory=dict)
    """Options of the build: `resize`, `seed`, `background`, `holdout`, `skip_bad`."""
    source_files: SourceFiles | None = None
    """None if the source is not a folder of images, or if an older version built the shards."""
    label_values: tuple[int, ...] | None = None
    """The label that each class has in the tars, ascending; None if these are 0, 1, ...

    Labels of foreign tars may begin at 1 or have gaps.
    """

    @property
    def total(self) -> int:
        """Number of images in all shards."""
        return sum(shard.count for shard in self.shards)

    def has_side(self, side: int | None) -> bool:
        """Return whether images are squares of this side length; None is any size."""
        return side is None or self.image_shape[:2] == (side, side)

    @property
    def checksum(self) -> str:
        """SHA-256 of the other fields."""
        return hashlib.sha256(json.dumps(self._content()).encode()).hexdigest()

    @property
    def label_width(self) -> int:
        """Number of digits of the longest label in the tars."""
        return len(str(self.label_values[-1] if self.label_values else len(self.classes) - 1))

    def _content(self) -> dict[str, Any]:
        content = asdict(self)
        if self.source_files is None:
            del content["source_files"]  # keeps the checksums of older indexes valid
        if self.label_values is None:
            del content["label_values"]
        return content

    def to_json(self) -> str:
        """Return the text of `index.json`, deterministic."""
        content = {"version": VERSION, "total": self.total, **self._content()}
        return json.dumps({**content, "checksum": self.checksum}, indent=1) + "\n"


def load_index(path: Path) -> Index:
    """Read an `index.json`. Raise UserError where it is missing, damaged or of another version."""
    rebuild = "build the shards again with python -m shards.build"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content.pop("version")
        if version != VERSION:
            raise UserError(f"{path} has version {version!r}, this code reads {VERSION}; {rebuild}")
        index = _parse_index(content)
        _check_layout(index)
        if (total := content.pop("total")) != index.total:
            raise ValueError(f"total {total!r} is not the sum of the counts")
        # Indexes of older versions have no checksum.
        if content.pop("checksum", index.checksum) != index.checksum:
            raise ValueError("checksum does not match")
        if unknown := content.keys() - asdict(index).keys():
            raise ValueError(f"unknown key {min(unknown)}")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; {rebuild}") from None
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(f"{path} is damaged ({reason}); {rebuild}") from None
    return index


def _parse_index(content: dict[str, Any]) -> Index:
    height, width, channels = (_count(size, "image_shape") for size in content["image_shape"])
    classes = tuple(_text(name, "classes") for name in content["classes"])
    shards = tuple(ShardFile(**shard) for shard in content["shards"])
    for shard in shards:
        name = _text(shard.name, "name")
        if Path(name).name != name or name in ("", "..") or not name.isprintable():
            raise ValueError(f"shard name {name!r} is not a plain file name")
        _count(shard.count, "count")
        _count(shard.size, "size")
        _check_sha256(shard.sha256)
    if channels != 3:
        raise ValueError(f"image_shape {content['image_shape']} is not [H, W, 3]")
    if len({shard.name for shard in shards}) != len(shards):
        raise ValueError("duplicate shard name")
    if not classes or not shards:
        raise ValueError("no classes" if shards else "no shards")
    if content["image_format"] not in IMAGE_FORMATS:
        raise ValueError(f"image_format {content['image_format']!r} is unknown")
    layout, source_files = content["layout"], None
    if (files := content.get("source_files")) is not None:
        source_files = SourceFiles(**files)
        _count(source_files.count, "source_files")
        _check_sha256(source_files.sha256)
    label_values = None
    if (values := content.get("label_values")) is not None:
        label_values = tuple(_count(value, "label_values", 0) for value in values)
        if len(values) != len(classes) or values != sorted(set(values)):
            raise ValueError("label_values are not ascending, one for each class")
    return Index(
        image_shape=(height, width, channels),
        image_format=content["image_format"],
        classes=classes,
        split=_text(content["split"], "split"),
        source=_text(content["source"], "source"),
        shards=shards,
        layout=None if layout is None else Layout(**layout),
        settings={key: _setting(value, key) for key, value in content["settings"].items()},
        source_files=source_files,
        label_values=label_values,
    )


def _check_layout(index: Index) -> None:
    """Raise ValueError where samples overlap or exceed their tars."""
    layout = index.layout
    if layout is None:
        return
    for key, value in asdict(layout).items():
        _count(value, key)
    end = max(
        layout.pixel_offset + math.prod(index.image_shape),
        layout.label_offset + index.label_width,
    )
    if end > layout.stride + min(layout.pixel_offset, layout.label_offset):
        raise ValueError("the samples of this layout overlap")
    for shard in index.shards:
        if (shard.count - 1) * layout.stride + end > shard.size:
            raise ValueError(f"{shard.name} is too small for this layout")


def _count(value: object, name: str, minimum: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value < 2**63:
        raise ValueError(f"{name} is {value!r}, not an integer of at least {minimum}")
    return value


def _check_sha256(value: object) -> None:
    if not isinstance(value, str) or not re.fullmatch(r"[0-9a-f]{64}", value):
        raise ValueError(f"sha256 is {value!r}")


def _setting(value: object, name: str) -> Setting:
    if isinstance(value, str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return _count(value, name, -(2**63))


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} is {value!r}, not a string")
    return value


def npy_header(image_shape: tuple[int, int, int]) -> bytes:
    """Return the npy header (version 1.0) of a uint8 image, independent of numpy's version."""
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {tuple(image_shape)}, }}"
    padding = -(10 + len(text) + 1) % 64
    content = text.encode() + b" " * padding + b"\n"
    return b"\x93NUMPY\x01\x00" + len(content).to_bytes(2, "little") + content


def fixed_layout(image_shape: tuple[int, int, int]) -> Layout:
    """Return the layout with which `shards.write` writes images of this shape."""
    header = len(npy_header(image_shape))
    content = header + int(np.prod(image_shape))
    blocks = -(-content // BLOCK)
    return Layout(
        stride=3 * BLOCK + blocks * BLOCK, label_offset=BLOCK, pixel_offset=3 * BLOCK + header
    )


def sample_key(index: int) -> str:
    """Return the WebDataset key of the image with this global index."""
    return f"{index:09d}"


def sha256_of(path: Path, advance: Callable[[int], None] = lambda count: None) -> str:
    """Return the SHA-256 of a file in hexadecimal; `advance` is called with numbers of bytes."""
    digest, buffer = hashlib.sha256(), bytearray(_CHUNK)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(view[:count])
            advance(count)
    return digest.hexdigest()


def check_size(folder: Path, shard: ShardFile) -> None:
    """Raise UserError where a shard is missing or its size differs from the index."""
    path = folder / shard.name
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise UserError(f"{path} is missing; build the shards again") from None
    if size != shard.size:
        raise UserError(
            f"{path} has {size} bytes, not the {shard.size} of its index; build the shards again"
        )
