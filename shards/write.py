"""Writing the images of a source as a folder of shards."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import webdataset

from dgm.common.errors import UserError
from dgm.common.progress import Progress
from dgm.common.progress import progress as show_progress
from shards.format import (
    INDEX,
    SOURCE_FILES,
    Index,
    ShardFile,
    SourceFiles,
    fixed_layout,
    npy_header,
    sample_key,
    sha256_of,
)
from shards.images import encode_png, ordered_map
from shards.sources import Source
from shards.validate_samples import validate_samples


def write_folder(
    source: Source,
    folder: Path,
    split: str,
    image_format: str = "npy",
    shard_size: int = 10_000,
    progress: bool = True,
    label: tuple[str, str] = ("building shards", "built shards"),
) -> Index:
    """Write every image of a source into tars of `shard_size` images, and `index.json`, in folder.

    label: text of the progress bar, and of the line at the end where there is no terminal.
    The bytes are the same on every run. Raise UserError where an image of the source is bad.
    """
    layout = fixed_layout(source.image_shape) if image_format == "npy" else None
    shards: list[ShardFile] = []
    samples = _encoded(source, image_format)
    with show_progress(
        label[0], len(source), "image", done=label[1], single_process=True, show=progress
    ) as bar:
        for first in range(0, len(source), shard_size):
            path = folder / f"{split}-{len(shards):05d}.tar"
            count = min(shard_size, len(source) - first)
            _write_tar(path, first, islice(samples, count), bar)
            if layout is not None:
                validate_samples(
                    path, layout, first, count, source.image_shape, len(source.classes)
                )
            shards.append(ShardFile(path.name, count, path.stat().st_size, sha256_of(path)))
    source_files = None
    if source.listing is not None:
        listing = source.listing.encode()
        (folder / SOURCE_FILES).write_bytes(listing)
        count = listing.count(b"\n") - 1  # the first line has the class names
        source_files = SourceFiles(count, hashlib.sha256(listing).hexdigest())
    index = Index(
        image_shape=source.image_shape,
        image_format=image_format,
        classes=source.classes,
        split=split,
        source=source.name,
        shards=tuple(shards),
        layout=layout,
        settings=source.settings,
        source_files=source_files,
    )
    (folder / INDEX).write_text(index.to_json(), encoding="utf-8")
    return index


def _encoded(source: Source, image_format: str) -> Iterator[dict[str, bytes]]:
    """Yield the members of each sample by extension."""
    header = npy_header(source.image_shape)

    def encode(sample: tuple[np.ndarray, int]) -> dict[str, bytes]:
        image, label = sample
        if image.shape != source.image_shape or image.dtype != np.uint8:
            found = f"{image.dtype} {image.shape}"
            expected = f"uint8 {source.image_shape}"
            raise UserError(f"{source.name} has an image of {found}, not {expected}")
        if image_format == "png":
            return {"cls": b"%d" % label, "png": encode_png(image)}
        return {"cls": b"%d" % label, "npy": header + image.tobytes()}

    samples = source.samples()
    # Threads help only where the encoder releases the GIL.
    return ordered_map(encode, samples) if image_format == "png" else map(encode, samples)


def _write_tar(path: Path, first: int, samples: Iterator[dict[str, bytes]], bar: Progress) -> None:
    with path.open("wb") as stream:
        # Fixed owner, mode and time, for the same bytes on every run.
        writer = webdataset.TarWriter(stream, encoder=False, mtime=0, user="", group="", mode=0o644)
        with writer:
            for number, members in enumerate(samples, start=first):
                writer.write({"__key__": sample_key(number), **members})
                bar.advance(1)
