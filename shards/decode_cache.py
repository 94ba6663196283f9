"""Decoding shards of other formats (WebDataset tars of any origin; PNG, JPEG, WebP) into a cache.

One scan finds every sample. Fixed-stride npy shards are read in place; all others are decoded once
into fixed-stride shards in a cache, whose key is made of the name, size and modification time of
each tar and the resize, so that changed shards are decoded again.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from shlex import quote

import numpy as np

from dgm.common.atomic_dirs import new_folder, remove
from dgm.common.atomic_io import replacing
from dgm.common.cache import cache_root
from dgm.common.errors import UserError
from dgm.common.formatting import counted, size_of
from shards.class_folders import ROLES
from shards.format import (
    INDEX,
    Index,
    Layout,
    ShardFile,
    check_size,
    fixed_layout,
    load_index,
    npy_header,
)
from shards.images import Decoded, decode_image, ordered_map
from shards.index_foreign import (
    ARCHIVE_SUFFIXES,
    Member,
    Sample,
    index_tar,
    read_label,
    unpack_command,
)
from shards.sources import Source, check_resize
from shards.verify import checksums

DECODED = ".decoded"
_MAX_CLASSES = 100_000
_VERSION = 3  # part of the cache key: copies and indexes of other versions are not used


@dataclass(frozen=True)
class _Tar:
    """A tar and its samples."""

    path: Path
    samples: list[Sample]
    labels: list[int | str]
    """As stored in the tar: numbers, or names of classes."""


@dataclass(frozen=True)
class _Scan:
    """The result of scanning the tars of a folder."""

    tars: list[_Tar]
    classes: tuple[str, ...]
    label_values: tuple[int, ...] | None
    """See `Index`."""
    numbers: dict[str, int]
    """The label number of each stored label."""


def fixed_stride_shards(
    path: Path, index: Index | None, resize: int | None = None, avoid: Path | None = None
) -> tuple[Path, Index]:
    """Return folder and index of fixed-stride shards with the images of a folder or tar.

    index: of the shards if they have one; resize: side length that images are cropped and resized
    to; avoid: a damaged decoded copy of another user, to be superseded by a new one. Raise
    UserError where a shard is bad.
    """
    check_resize(resize)
    folder, paths = _tars(path, index)
    key = _cache_key(paths, index)
    index_paths = [cache / f"{key}.json" for cache in _cache_folders("index")]
    for index_path in index_paths if avoid is None else []:
        with suppress(UserError, OSError):  # missing, damaged, or of another user
            known = load_index(index_path)
            if known.has_side(resize):
                return folder, known
    subject = "all" if path.is_dir() else path.name
    names = [f"{subject}-{key}"]
    if resize is not None:
        names.append(f"{subject}-{resize}-{_cache_key(paths, index, resize)}")
    caches = [*_cache_folders("decoded"), folder / DECODED]
    if avoid is not None:
        caches = caches[: caches.index(avoid.parent)]
    for target in (cache / name for name in names for cache in caches):
        copy = _load_copy(target)
        if copy is not None and copy.has_side(resize):
            return target, copy
    scan = _scan(paths, index.classes if index else None)
    in_place = _index_in_place(scan, resize)
    if in_place is not None:
        _cache_index(index_paths, in_place)
        return folder, in_place
    target = _choose_target([cache / names[-1] for cache in reversed(caches)])
    source = _source(scan, path, resize)
    return target, _decode_into(target, source, path, index.split if index else "train")


def _cache_folders(name: str) -> list[Path]:
    """Return the folder for this user alone, for a cache that users share, and the usual folder."""
    return [cache_root() / f"{name}-{os.geteuid()}", cache_root() / name]


def _load_copy(target: Path) -> Index | None:
    """Return the index of a decoded copy; None where there is none that can be used."""
    if not os.path.lexists(target):
        return None
    try:
        index = load_index(target / INDEX)
        for shard in index.shards:
            check_size(target, shard)
            (target / shard.name).open("rb").close()
    except (UserError, OSError) as error:
        reason = str(error).rpartition(";")[0] or str(error)
        warnings.warn(f"decoded copy {target} is not used: {reason}", stacklevel=2)
        return None
    return index


def _choose_target(targets: list[Path]) -> Path:
    """Return the first path that a copy can be written to; if none, one to name in the error."""
    for target in targets:
        try:
            parent = next(parent for parent in target.parents if parent.exists())
        except OSError:  # no access to a folder above
            continue
        if not os.access(parent, os.W_OK | os.X_OK):
            continue
        if not os.path.lexists(target):
            return target
        if is_own(target):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if _load_copy(target) is None:  # otherwise another process has made it
                    remove(target)
            return target
    return targets[min(1, len(targets) - 1)]


def is_own(path: Path) -> bool:
    """Return whether a file or folder belongs to the user of this process."""
    try:
        return path.lstat().st_uid == os.geteuid()
    except OSError:
        return False


def encoded_source(folder: Path, index: Index) -> Source:
    """Return a source that decodes the images of a folder of encoded shards."""
    _, paths = _tars(folder, index)
    source = _source(_scan(paths, index.classes), folder)
    if len(source) != index.total or source.image_shape != index.image_shape:
        raise UserError(
            f"{folder} holds {len(source)} images {source.image_shape}, not the {index.total} "
            f"{index.image_shape} of its index; build the shards again"
        )
    return source


def _tars(path: Path, index: Index | None) -> tuple[Path, list[Path]]:
    if not path.is_dir():
        return path.parent, [path]
    names = [shard.name for shard in index.shards] if index else []
    paths = [path / name for name in names] or sorted(path.glob("*.tar"))
    if not names:
        _check_one_split(path, paths)
    return path, paths


def _check_one_split(folder: Path, paths: list[Path]) -> None:
    """Raise UserError where the names of tars have several splits: train-0.tar and val-0.tar."""
    first: dict[str, str] = {}
    for path in paths:
        for word in re.findall("[a-z]+", path.stem.lower()):
            if word in ROLES:
                first.setdefault(ROLES[word], path.name)
    if "train" in first and len(first) > 1:
        raise UserError(
            f"{folder} holds tars of several splits ({', '.join(first.values())}): move each split "
            "into its own folder, and set data.shards and data.test_shards to these"
        )


def check_holds_shards(path: Path, source: str = "SOURCE", split: str = "SPLIT") -> None:
    """Raise UserError where a path is neither a tar nor a folder of tars."""
    command = f"python -m shards.build --source {source} --split {split} --out {quote(str(path))}"
    if not path.exists():
        raise UserError(f"shards {path} do not exist; build them with {command}")
    if not path.is_dir() or (path / INDEX).is_file() or any(path.glob("*.tar")):
        return
    archives = sorted(p for p in path.iterdir() if p.name.lower().endswith(ARCHIVE_SUFFIXES))
    for archive in archives:
        if (remedy := unpack_command(archive)) is not None:
            raise UserError(
                f"{path} holds no plain tars, but {len(archives)} compressed ones, such as "
                f"{archive.name}; {remedy}"
            )
    for inner in sorted(path.glob("*/*.tar"))[:1]:
        raise UserError(f"{path} holds no shards, but {inner.parent} does: use that folder")
    raise UserError(
        f"{path} holds no shards; build them with {command}, or name class folders of images as "
        f"data.source folder:{path}"
    )


def _cache_key(paths: list[Path], index: Index | None, resize: int | None = None) -> str:
    digest = hashlib.sha256(f"{paths[0].parent.resolve()}\t{_VERSION}".encode())
    if index is not None:
        digest.update(index.to_json().encode())
    for path in paths:
        stat = path.stat()
        digest.update(f"\n{path.name}\t{stat.st_size}\t{stat.st_mtime_ns}".encode())
    if resize is not None:
        digest.update(f"\nresize\t{resize}".encode())
    return digest.hexdigest()[:16]


def _scan(paths: list[Path], classes: tuple[str, ...] | None) -> _Scan:
    tars = []
    for path in paths:
        samples, content = index_tar(path), _mapped(path)
        labels = [read_label(content, s.label, f"{path}: sample {s.key}") for s in samples]
        tars.append(_Tar(path, samples, labels))
    found = {label for tar in tars for label in tar.labels}
    names, values = _number(paths[0].parent, found, classes)
    numbers = {name: label for label, name in enumerate(names)}
    if values is None and any(isinstance(label, int) for label in found):
        numbers = {str(label): label for label in range(len(names))}
    for name in sorted(map(str, found)):
        if name not in numbers:
            raise UserError(
                f"{paths[0].parent}: label {name} is none of the {len(names)} classes of its "
                "index; build the shards again"
            )
    return _Scan(tars, names, values, numbers)


def _number(
    folder: Path, found: set[int | str], classes: tuple[str, ...] | None
) -> tuple[tuple[str, ...], tuple[int, ...] | None]:
    """Return the class names of the labels that occur, in ascending order, and `label_values`."""
    numbers = sorted(value for value in found if isinstance(value, int))
    texts = sorted(value for value in found if isinstance(value, str))
    if numbers and texts:
        raise UserError(
            f"{folder}: some labels are numbers from 0, others names ({numbers[0]} and "
            f"{texts[0][:80]!r}); use one kind"
        )
    if classes is not None:
        return classes, None
    if len(found) > _MAX_CLASSES:
        raise UserError(
            f"{folder} has {len(found):,} different labels, more than the maximum of "
            f"{_MAX_CLASSES:,} classes; correct the labels"
        )
    names = tuple(map(str, numbers)) if numbers else tuple(texts)
    gaps = numbers and numbers != list(range(len(numbers)))
    return names, tuple(numbers) if gaps else None


def _mapped(path: Path) -> mmap.mmap:
    with path.open("rb") as stream:
        return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)


def _index_in_place(scan: _Scan, resize: int | None) -> Index | None:
    """Return the index of tars of the same fixed stride and the right size, None for others."""
    layouts = set(map(_layout, scan.tars))
    found = layouts.pop()
    if layouts or found is None or (resize is not None and found[1][:2] != (resize, resize)):
        return None
    layout, image_shape = found
    paths = [tar.path for tar in scan.tars]
    shards = tuple(
        ShardFile(tar.path.name, len(tar.samples), tar.path.stat().st_size, checksum)
        for tar, checksum in zip(scan.tars, checksums(paths), strict=True)
    )
    return Index(
        image_shape, "npy", scan.classes, "train", f"tar:{paths[0].parent}", shards, layout,
        label_values=scan.label_values,
    )  # fmt: skip


def _layout(tar: _Tar) -> tuple[Layout, tuple[int, int, int]] | None:
    """Return layout and image shape of a tar with a fixed stride, None for others."""
    first = tar.samples[0]
    if first.image.extension != "npy":
        return None
    content = _mapped(tar.path)
    height, width, _ = _decode(content, tar, first).pixels.shape
    image_shape = (height, width, 3)
    header = npy_header(image_shape)
    layout = fixed_layout(image_shape)  # a single sample fits any stride
    if len(tar.samples) > 1:
        layout = replace(layout, stride=tar.samples[1].image.offset - first.image.offset)
    for number, (sample, label) in enumerate(zip(tar.samples, tar.labels, strict=True)):
        image, text = sample.image, _bytes_of(content, sample.label).rstrip()
        if (
            image.offset != first.image.offset + number * layout.stride
            or sample.label.offset != first.label.offset + number * layout.stride
            or (image.extension, image.size) != ("npy", len(header) + math.prod(image_shape))
            or content[image.offset : image.offset + len(header)] != header
            or not isinstance(label, int)
            or text != str(label).encode()
        ):
            return None
    return Layout(layout.stride, first.label.offset, first.image.offset + len(header)), image_shape


def _bytes_of(content: mmap.mmap, member: Member) -> bytes:
    return content[member.offset : member.offset + member.size]


def _cache_index(paths: list[Path], index: Index) -> None:
    """Write an index to the last of these paths that can be written, if any."""
    for path in reversed(paths):
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path, shared=True) as partial:
                partial.write_text(index.to_json(), encoding="utf-8")
            return


def _source(scan: _Scan, path: Path, resize: int | None = None) -> Source:
    first = scan.tars[0]
    image = _decode(_mapped(first.path), first, first.samples[0], resize).pixels
    shape = (image.shape[0], image.shape[1], 3)
    notes: list[str] = []
    return Source(
        name=f"tar:{path}",
        classes=scan.classes,
        image_shape=shape,
        length=sum(len(tar.samples) for tar in scan.tars),
        samples=lambda: _decode_all(scan, shape, resize, notes),
        settings={} if resize is None else {"resize": resize},
        notes=notes,
    )


def _decode(content: mmap.mmap, tar: _Tar, sample: Sample, resize: int | None = None) -> Decoded:
    name = f"{tar.path}: sample {sample.key}"
    return decode_image(_bytes_of(content, sample.image), name, resize)


def _decode_all(
    scan: _Scan, shape: tuple[int, int, int], resize: int | None, notes: list[str]
) -> Iterator[tuple[np.ndarray, int]]:
    """Yield image and label of all samples in order; `notes` gets a line on transparent images."""
    count = 0
    for tar in scan.tars:
        read = partial(_decode, _mapped(tar.path), tar, resize=resize)
        images = ordered_map(read, tar.samples)
        for image, sample, label in zip(images, tar.samples, tar.labels, strict=True):
            if image.pixels.shape != shape:
                height, width = image.pixels.shape[:2]
                raise UserError(
                    f"{tar.path}: sample {sample.key} is {width} x {height} but the first one is "
                    f"{shape[1]} x {shape[0]}; give data.resize to make all images one size"
                )
            if image.transparent:
                count += 1
                notes[:] = [f"{counted(count, 'image')} with transparent parts composited on white"]
            yield image.pixels, scan.numbers[str(label)]


def _decode_into(target: Path, source: Source, path: Path, split: str) -> Index:
    from shards.write import write_folder

    what = counted(len(source), "image")
    label = (f"decoding {what}", f"decoded {what}")
    with new_folder(target, INDEX, "set XDG_CACHE_HOME to a folder that can be written") as folder:
        index = write_folder(source, folder, split, label=label)
    size = size_of(sum(shard.size for shard in index.shards))
    for line in (f"decoded copy of {path}: {target} ({what}, {size})", *source.notes):
        print(line, file=sys.stderr, flush=True)
    if target.parent.name == DECODED:
        # Remove copies of earlier versions of the shards; memory maps of them stay valid.
        subject = target.name.rpartition("-")[0]
        for old in target.parent.iterdir():
            if old.name.rpartition("-")[0] == subject and old != target:
                remove(old)
    return index
