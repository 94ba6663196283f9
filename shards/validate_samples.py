"""Checking every sample of a fixed-stride tar written by this package."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np

from dgm.common.errors import UserError
from shards.format import BLOCK, Layout, fixed_layout, npy_header, parse_labels, sample_key

_CHUNK = 4096  # samples at a time, to limit memory
_NAME = slice(0, 100)
_SIZE = slice(124, 136)
_CHECKSUM = slice(148, 156)


def validate_samples(
    path: Path,
    layout: Layout,
    first: int,
    count: int,
    image_shape: tuple[int, int, int],
    num_classes: int,
) -> None:
    """Check names, tar headers, npy headers and labels of samples first .. first + count - 1.

    Raise UserError with the shard and its first damaged sample.
    """
    if layout != fixed_layout(image_shape):
        raise UserError(f"{path} is not laid out as its index says; build it again")
    size = path.stat().st_size
    if size < count * layout.stride + 2 * BLOCK:
        raise UserError(f"{path} is truncated: {size} bytes for {count} samples; build it again")
    content = np.memmap(path, np.uint8, "r")
    if content[count * layout.stride :].any():
        raise UserError(f"{path} has data after its last sample; build it again")
    samples = content[: count * layout.stride].reshape(count, layout.stride)
    for start in range(0, count, _CHUNK):
        rows = samples[start : start + _CHUNK]
        good = _good_samples(rows, layout, first + start, image_shape, num_classes)
        if not good.all():
            key = sample_key(first + start + int(np.argmin(good)))
            raise UserError(f"{path} is damaged at sample {key}; build it again")


def _good_samples(
    rows: np.ndarray,
    layout: Layout,
    first: int,
    image_shape: tuple[int, int, int],
    num_classes: int,
) -> np.ndarray:
    """Return which samples are undamaged: bool [n]. rows: uint8 [n, stride]."""
    header = np.frombuffer(npy_header(image_shape), np.uint8)
    start = 3 * BLOCK
    good = (rows[:, start : start + len(header)] == header).all(axis=1)
    keys = [sample_key(first + row) for row in range(len(rows))]
    digits = rows[:, layout.label_offset : layout.label_offset + len(str(num_classes - 1)) + 1]
    labels = parse_labels(digits)
    lengths = np.cumprod(digits - np.uint8(48) < 10, axis=1).sum(axis=1)
    good &= (labels < num_classes) & (lengths > 0) & (lengths < digits.shape[1])
    npy_size = np.full(len(rows), len(header) + int(np.prod(image_shape)))
    good &= _good_headers(rows[:, :BLOCK], keys, ".cls", lengths)
    good &= _good_headers(rows[:, 2 * BLOCK : start], keys, ".npy", npy_size)
    return good


def _good_headers(
    blocks: np.ndarray, keys: list[str], suffix: str, sizes: np.ndarray
) -> np.ndarray:
    """Return which tar headers are those of files KEY + suffix of these sizes."""
    info = tarfile.TarInfo(keys[0] + suffix)
    info.mode = 0o644
    template = np.frombuffer(info.tobuf(tarfile.USTAR_FORMAT), np.uint8)
    expected = np.tile(template, (len(keys), 1))
    expected[:, _NAME] = _fields([(key + suffix).encode() for key in keys], 100)
    expected[:, _SIZE] = _fields([b"%011o" % size for size in sizes], 12)
    expected[:, _CHECKSUM] = ord(" ")  # the checksum counts its own bytes as spaces
    totals = expected.sum(axis=1, dtype=np.int64)
    expected[:, _CHECKSUM] = _fields([b"%06o\0 " % total for total in totals], 8)
    return (blocks == expected).all(axis=1)


def _fields(texts: list[bytes], width: int) -> np.ndarray:
    """Return texts padded with zero bytes: uint8 [n, width]."""
    return np.array(texts, f"S{width}").view(np.uint8).reshape(-1, width)
