"""Reading shards by global index, as memory.

Only numpy and the standard library are imported, so a process has its first batch at once.
Shards that cannot be read in place (PNG, JPEG, ...) are decoded once by `shards.decode`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from shards.errors import ShardError
from shards.format import (
    INDEX,
    Index,
    Layout,
    ShardFile,
    check_size,
    load_index,
    npy_header,
    parse_labels,
)


class Shards:
    """Read images of a shard folder by global index."""

    image_shape: tuple[int, int, int]
    """(H, W, 3)"""
    classes: tuple[str, ...]
    """Names in label order."""
    folder: Path
    """Where the tars that are mapped lie; a cache where shards had to be decoded."""
    index: Index
    """What they hold."""

    def __init__(self, folder: str | Path) -> None:
        """Map the shards of a folder, or one tar.

        Cheap for fixed-stride shards: reads the index, checks sizes, reads no image.
        Raises ShardError where shards are missing, truncated or damaged.
        """
        self._path = Path(folder)
        self.folder, self.index = _locate(self._path)
        self.image_shape = self.index.image_shape
        self.classes = self.index.classes
        counts = [shard.count for shard in self.index.shards]
        self._starts = np.concatenate([[0], np.cumsum(counts)])
        views = [self._map(shard) for shard in self.index.shards]
        self._pixels = [pixels for pixels, _ in views]
        self._digits = [digits for _, digits in views]

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __reduce__(self) -> tuple[type[Shards], tuple[Path]]:
        return Shards, (self._path,)  # a pickled map would carry all its bytes

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    def images(self, index: np.ndarray) -> np.ndarray:
        """Return the images at these global indices: uint8 [B, H, W, 3], contiguous.

        Raises IndexError where an index is negative or not below len(self).
        """
        index = self._checked(index)
        images = self._gather(self._pixels, index)
        return images.view(np.uint8).reshape(len(images), *self.image_shape)

    def labels(self, index: np.ndarray) -> np.ndarray:
        """Return the labels at these global indices: int64 [B].

        Raises IndexError where an index is negative or not below len(self).
        """
        index = self._checked(index)
        digits = self._gather(self._digits, index)
        return parse_labels(digits.view(np.uint8).reshape(len(digits), digits.itemsize))

    def _gather(self, views: list[np.ndarray], index: np.ndarray) -> np.ndarray:
        """Copy items of the shards' views, by global index, into one array."""
        if len(views) == 1:
            return views[0][index]
        shard = np.searchsorted(self._starts, index, side="right") - 1
        local = (index - self._starts[shard]).tolist()
        out = np.empty(len(index), views[0].dtype)
        for row, number in enumerate(shard.tolist()):
            out[row] = views[number][local[row]]
        return out

    def _checked(self, index: np.ndarray) -> np.ndarray:
        """Return the index as int64 [B], every one in range."""
        index = np.asarray(index)
        if index.ndim != 1 or (index.size and index.dtype.kind not in "iu"):
            raise IndexError(f"index must be integers [B], not {index.dtype} {index.shape}")
        if index.size and (index.min() < 0 or index.max() >= len(self)):
            bad = index[(index < 0) | (index >= len(self))][0]
            raise IndexError(f"image {bad} of {self._path}, which holds {len(self)} images")
        return index.astype(np.int64, copy=False)

    def _map(self, shard: ShardFile) -> tuple[np.ndarray, np.ndarray]:
        """Return pixels and label digits of one shard, one opaque item per sample, not copied."""
        layout = self.index.layout
        assert layout is not None, "_locate returns shards of fixed stride"
        path = self.folder / shard.name
        content = np.memmap(path, np.uint8, "r")
        size = int(np.prod(self.image_shape))
        _check_fits(path, content, layout, shard.count, self.image_shape)
        width = len(str(len(self.classes) - 1))
        pixels = np.ndarray(
            shard.count, f"V{size}", content, layout.pixel_offset, strides=(layout.stride,)
        )
        digits = np.ndarray(
            shard.count, f"V{width}", content, layout.label_offset, strides=(layout.stride,)
        )
        return pixels, digits


def open_shards(spec: str | Path) -> Shards:
    """Open a folder of shards, one local tar, or remote tars such as `https://.../{000..004}.tar`.

    Remote tars are fetched into the cache first. Raises ShardError where that fails.
    """
    from shards.remote import fetch, is_remote

    return Shards(fetch(str(spec)) if is_remote(str(spec)) else spec)


def _locate(path: Path) -> tuple[Path, Index]:
    """Find the fixed-stride shards for a folder or tar: its own, or a decoded copy in a cache."""
    folder = path if path.is_dir() else path.parent
    if (folder / INDEX).is_file():
        index = load_index(folder / INDEX)
        if path != folder:
            index = _only(index, path)
        for shard in index.shards:
            check_size(folder, shard)
        if index.layout is not None:
            return folder, index
    else:
        index = None
        if not path.exists():
            raise ShardError(f"{path} does not exist; build it with python -m shards.build")
    from shards.decode import readable

    return readable(path, index)


def _only(index: Index, path: Path) -> Index:
    from dataclasses import replace

    shards = tuple(shard for shard in index.shards if shard.name == path.name)
    if not shards:
        raise ShardError(f"{path} is not in {path.parent / INDEX}; move it to another folder")
    return replace(index, shards=shards)


def _check_fits(
    path: Path, content: np.ndarray, layout: Layout, count: int, image_shape: tuple[int, int, int]
) -> None:
    header = npy_header(image_shape)
    for start in (0, (count - 1) * layout.stride):  # a wrong index would miss the first or last
        pixels = start + layout.pixel_offset
        found = content[max(0, pixels - len(header)) : pixels].tobytes()
        if pixels + int(np.prod(image_shape)) > len(content) or found != header:
            raise ShardError(f"{path} is not laid out as its index says; build it again")
