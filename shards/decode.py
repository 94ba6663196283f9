"""Making other shards readable in place: other people's, and PNG, JPEG or WebP ones.

One scan finds every sample. Fixed-stride npy shards are then read where they lie; all others are
decoded once into fixed-stride shards in a cache, whose key is the name, size and time of change
of each tar, so that changed shards are decoded anew.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shards.errors import ShardError
from shards.folders import cache_root, new_folder, remove, temporary_sibling
from shards.format import BLOCK, INDEX, Index, Layout, ShardFile, load_index, npy_header
from shards.images import decode_image, ordered_map
from shards.scan import Sample, read_label, scan_tar
from shards.sources import Source

DECODED = ".decoded"
_MAX_CLASSES = 100_000


@dataclass(frozen=True)
class _Scan:
    """What one scan of a list of tars found."""

    paths: list[Path]
    samples: list[list[Sample]]
    labels: list[list[int]]
    classes: tuple[str, ...]


def readable(path: Path, index: Index | None) -> tuple[Path, Index]:
    """Return folder and index of fixed-stride shards with the images of a folder or tar.

    index: that of the shards where they have one. Raises ShardError where a shard is bad.
    """
    folder, paths = _tars(path, index)
    key = _cache_key(paths, index)
    known = cache_root() / "index" / f"{key}.json"
    name = f"{'all' if path.is_dir() else path.name}-{key}"
    kept = [folder / DECODED / name, cache_root() / "decoded" / name]
    for place in kept:
        if (place / INDEX).is_file():
            return place, load_index(place / INDEX)
    if known.is_file():
        with suppress(ShardError):  # a damaged one is made again
            return folder, load_index(known)
    scan = _scan(paths, index.classes if index else None)
    layout = _common_layout(scan)
    if layout is not None:
        found = _index_in_place(scan, *layout)
        _keep_index(known, found)
        return folder, found
    place = kept[0] if os.access(folder, os.W_OK) else kept[1]
    return place, _decode_into(place, _source(scan, path), index.split if index else "train")


def source_of(folder: Path, index: Index) -> Source:
    """Return a source that decodes the images of a folder of encoded shards."""
    _, paths = _tars(folder, index)
    source = _source(_scan(paths, index.classes), folder)
    if len(source) != index.total or source.image_shape != index.image_shape:
        raise ShardError(
            f"{folder} holds {len(source)} images {source.image_shape}, not the {index.total} "
            f"{index.image_shape} of its index; build the shards again"
        )
    return source


def _tars(path: Path, index: Index | None) -> tuple[Path, list[Path]]:
    if not path.is_dir():
        return path.parent, [path]
    names = [shard.name for shard in index.shards] if index else []
    paths = [path / name for name in names] or sorted(path.glob("*.tar"))
    if not paths:
        raise ShardError(
            f"{path} holds no shards (no {INDEX}, no *.tar); build them with python -m shards.build"
        )
    return path, paths


def _cache_key(paths: list[Path], index: Index | None) -> str:
    # The 2 is the decoder's version: it composes transparent images on white.
    digest = hashlib.sha256(f"{paths[0].parent.resolve()}\t2".encode())
    if index is not None:
        digest.update(index.to_json().encode())
    for path in paths:
        stat = path.stat()
        digest.update(f"\n{path.name}\t{stat.st_size}\t{stat.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


def _scan(paths: list[Path], classes: tuple[str, ...] | None) -> _Scan:
    samples = [scan_tar(path) for path in paths]
    raw = [_raw_labels(path, found) for path, found in zip(paths, samples, strict=True)]
    values = {label for shard in raw for label in shard}
    if all(isinstance(value, str) for value in values):
        names = classes or tuple(sorted(str(value) for value in values))
        number = {name: label for label, name in enumerate(names)}
    elif all(isinstance(value, int) for value in values):
        top = max(int(value) for value in values)
        if top >= _MAX_CLASSES:
            raise ShardError(f"{paths[0].parent}: label {top} is no class; give labels from 0")
        names = classes or tuple(str(label) for label in range(top + 1))
        number = {str(label): label for label in range(len(names))}
    else:
        raise ShardError(f"{paths[0].parent}: some labels are numbers, others names; use one kind")
    for value in sorted(str(value) for value in values):
        if value not in number:
            raise ShardError(
                f"{paths[0].parent}: label {value} is none of the {len(names)} classes of its "
                "index; build the shards again"
            )
    labels = [[number[str(value)] for value in shard] for shard in raw]
    return _Scan(paths, samples, labels, names)


def _raw_labels(path: Path, samples: list[Sample]) -> list[int | str]:
    with path.open("rb") as stream, _mapped(stream.fileno()) as content:
        return [
            read_label(content, sample.label, f"{path}: sample {sample.key}") for sample in samples
        ]


def _mapped(handle: int) -> mmap.mmap:
    return mmap.mmap(handle, 0, access=mmap.ACCESS_READ)


def _common_layout(scan: _Scan) -> tuple[Layout, tuple[int, int, int]] | None:
    """Return layout and image shape where all shards share one fixed stride, else None."""
    found = {_layout(*shard) for shard in zip(scan.paths, scan.samples, scan.labels, strict=True)}
    return found.pop() if len(found) == 1 else None


def _layout(
    path: Path, samples: list[Sample], labels: list[int]
) -> tuple[Layout, tuple[int, int, int]] | None:
    images = {(sample.image.extension, sample.image.size) for sample in samples}
    if len(images) > 1 or samples[0].image.extension != "npy":
        return None
    pixels = np.array([sample.image.offset for sample in samples])
    digits = np.array([sample.label.offset for sample in samples])
    image = samples[0].image
    # One sample has any stride; take that of a sample of two members.
    content_blocks = -(-image.size // BLOCK)
    stride = int(pixels[1] - pixels[0]) if len(samples) > 1 else (3 + content_blocks) * BLOCK
    steps = np.arange(len(samples)) * stride
    if (pixels - pixels[0] != steps).any() or (digits - digits[0] != steps).any():
        return None
    with path.open("rb") as stream, _mapped(stream.fileno()) as content:
        shape = decode_image(_bytes_of(content, samples[0]), f"{path}: {samples[0].key}").shape
        image_shape = (shape[0], shape[1], 3)
        header = npy_header(image_shape)
        for sample, label in zip(samples, labels, strict=True):
            text = content[sample.label.offset : sample.label.offset + sample.label.size]
            plain = sample.label.extension != "json" and text.rstrip() == b"%d" % label
            if not plain or not _bytes_of(content, sample).startswith(header):
                return None
    if image.size != len(header) + int(np.prod(image_shape)):
        return None
    return Layout(stride, int(digits[0]), int(pixels[0]) + len(header)), image_shape


def _bytes_of(content: mmap.mmap, sample: Sample) -> bytes:
    return content[sample.image.offset : sample.image.offset + sample.image.size]


def _index_in_place(scan: _Scan, layout: Layout, image_shape: tuple[int, int, int]) -> Index:
    shards = [
        ShardFile(path.name, len(samples), path.stat().st_size, "")
        for path, samples in zip(scan.paths, scan.samples, strict=True)
    ]
    source = f"tar:{scan.paths[0].parent}"
    return Index(image_shape, "npy", scan.classes, "train", source, tuple(shards), layout)


def _keep_index(known: Path, index: Index) -> None:
    """Write an index into the cache; where that cannot be written, the next process scans again."""
    temporary = temporary_sibling(known)
    with suppress(OSError):
        known.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(index.to_json(), encoding="utf-8")
            os.replace(temporary, known)
        finally:
            remove(temporary)


def _source(scan: _Scan, path: Path) -> Source:
    image_shape = next(_decoded(scan.paths[:1], [scan.samples[0][:1]], [[0]], None))[0].shape
    shape = (image_shape[0], image_shape[1], 3)
    return Source(
        name=f"tar:{path}",
        classes=scan.classes,
        image_shape=shape,
        length=sum(len(samples) for samples in scan.samples),
        samples=lambda: _decoded(scan.paths, scan.samples, scan.labels, shape),
    )


def _decoded(
    paths: list[Path],
    samples: list[list[Sample]],
    labels: list[list[int]],
    shape: tuple[int, int, int] | None,
) -> Iterator[tuple[np.ndarray, int]]:
    """Decode the images of all shards, in order."""
    for path, found, numbers in zip(paths, samples, labels, strict=True):
        with path.open("rb") as stream, _mapped(stream.fileno()) as content:

            def decode(sample: Sample, path: Path = path, content: mmap.mmap = content):
                where = f"{path}: sample {sample.key}"
                image = decode_image(_bytes_of(content, sample), where)
                if shape is not None and image.shape != shape:
                    raise ShardError(
                        f"{where} is {image.shape[1]} x {image.shape[0]} but the first one is "
                        f"{shape[1]} x {shape[0]}; make all images one size"
                    )
                return image

            yield from zip(ordered_map(decode, found), numbers, strict=True)


def _decode_into(place: Path, source: Source, split: str) -> Index:
    from shards.write import write_folder

    with new_folder(place, same=INDEX) as folder:
        index = write_folder(source, folder, split)
    if place.parent.name == DECODED:
        # Copies of what the shards were before; an open map of them stays valid.
        subject = place.name.rpartition("-")[0]
        for old in place.parent.iterdir():
            if old.name.rpartition("-")[0] == subject and old != place:
                remove(old)
    return index
