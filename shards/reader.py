"""Reading shards by global index, through memory maps.

Imports only numpy and the standard library, so that the first batch is read without delay.
Shards that cannot be read in place (PNG, JPEG, ...) are decoded once by `shards.decode_cache`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dgm.common.errors import UserError
from shards.format import INDEX, Index, ShardFile, check_size, load_index, npy_header


class Shards:
    """The images of a shard folder, read by global index."""

    image_shape: tuple[int, int, int]
    """(H, W, 3)"""
    classes: tuple[str, ...]
    """Names in label order."""
    matched_by_number: bool
    """Whether classes were matched by number, because they have no names."""
    folder: Path
    """The folder of the mapped tars; a cache where shards had to be decoded."""
    index: Index
    """The index of that folder."""

    def __init__(
        self,
        folder: str | Path,
        resize: int | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        """Map the shards of a folder, or one tar.

        resize: side length that images of another size are cropped and resized to, once, into a
        cache; classes: names that define the label numbers, such as those of the train images for
        test images.
        Fixed-stride shards are only checked for their size; no image is read.
        Raise UserError where shards are missing, truncated or damaged, or have images of a class
        that is not in `classes`.
        """
        self._path, self._resize = Path(folder), resize
        self.folder, self.index = locate(self._path, resize)
        self.image_shape = self.index.image_shape
        self.classes = self.index.classes if classes is None else tuple(classes)
        values = self.index.label_values
        self._values = None if values is None else np.array(values)
        self._numbers: np.ndarray | None = None
        counts = [shard.count for shard in self.index.shards]
        self._starts = np.concatenate([[0], np.cumsum(counts)])
        views = [self._map(shard) for shard in self.index.shards]
        self._pixels = [pixels for pixels, _ in views]
        self._digits = [digits for _, digits in views]
        self.matched_by_number = False
        if classes is not None and self.classes != self.index.classes:
            self._match()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __reduce__(self) -> tuple[type[Shards], tuple[Any, ...]]:
        # A pickled memory map would contain all its bytes.
        return Shards, (self._path, self._resize, self.classes)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    def images(self, index: np.ndarray) -> np.ndarray:
        """Return the images at these global indices: uint8 [B, H, W, 3], contiguous.

        Raise IndexError where an index is negative or not below len(self).
        """
        index = self._checked(index)
        images = self._gather(self._pixels, index)
        return images.view(np.uint8).reshape(len(images), *self.image_shape)

    def labels(self, index: np.ndarray) -> np.ndarray:
        """Return the labels at these global indices: int64 [B], each below num_classes.

        Raise IndexError where an index is negative or not below len(self), UserError where a tar
        has a label that is not a number, or not in its index.
        """
        digits = self._gather(self._digits, self._checked(index))
        try:
            labels = digits.view(f"S{digits.itemsize}").astype(np.int64)
        except (ValueError, OverflowError):
            raise UserError(f"{self._path} has a label that is not a number; replace it") from None
        if self._values is not None:
            stored = labels
            labels = np.searchsorted(self._values, stored).clip(max=len(self._values) - 1)
            if (bad := stored[self._values[labels] != stored]).size:
                raise UserError(f"{self._path} has label {bad[0]}, not in its index; replace it")
        return labels if self._numbers is None else self._numbers[labels]

    def _match(self) -> None:
        """Map the labels of the shards' own classes to those of `self.classes`."""
        numbers, self.matched_by_number = match_classes(self.index.classes, self.classes)
        if None in numbers:
            labels = self.labels(np.arange(len(self)))  # classes without images do not matter
            for label in np.unique(labels).tolist():
                if numbers[label] is None:
                    names = ", ".join(self.classes[:10]) + ", ..." * (len(self.classes) > 10)
                    raise UserError(
                        f"{self._path} holds images of class {self.index.classes[label]}, which "
                        f"the train images lack ({names}); remove these images, or give other "
                        "test shards"
                    )
        self._numbers = np.array([-1 if number is None else number for number in numbers])

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
        """Return the index as int64 [B]; raise IndexError where one is out of range."""
        index = np.asarray(index)
        if index.ndim != 1 or (index.size and index.dtype.kind not in "iu"):
            raise IndexError(f"index must be integers [B], not {index.dtype} {index.shape}")
        if index.size and (index.min() < 0 or index.max() >= len(self)):
            bad = index[(index < 0) | (index >= len(self))][0]
            raise IndexError(f"image {bad} of {self._path}, which holds {len(self)} images")
        return index.astype(np.int64, copy=False)

    def _map(self, shard: ShardFile) -> tuple[np.ndarray, np.ndarray]:
        """Return views of pixels and label digits of one shard, one opaque item per sample."""
        layout, count = self.index.layout, shard.count
        assert layout is not None, "`locate` returns shards of fixed stride"
        path = self.folder / shard.name
        content = np.memmap(path, np.uint8, "r")
        size, header = int(np.prod(self.image_shape)), npy_header(self.image_shape)
        for start in (0, (count - 1) * layout.stride):  # the first and the last sample
            first = start + layout.pixel_offset
            stored = content[max(0, first - len(header)) : first].tobytes()
            if first + size > len(content) or stored != header:
                raise UserError(f"{path} is not laid out as its index says; build it again")
        width, strides = self.index.label_width, (layout.stride,)
        pixels = np.ndarray(count, f"V{size}", content, layout.pixel_offset, strides=strides)
        digits = np.ndarray(count, f"V{width}", content, layout.label_offset, strides=strides)
        return pixels, digits


def match_classes(own: Sequence[str], given: Sequence[str]) -> tuple[list[int | None], bool]:
    """Return the index in `given` of each class of `own`, and whether they match by number.

    Classes match by name. Where no name matches and one side has only label numbers (0, 1, ...) as
    names, they match by number.
    """
    number = {name: label for label, name in enumerate(given)}
    labels = [number.get(name) for name in own]
    if any(label is not None for label in labels):
        return labels, False
    if list(given) == [str(label) for label in range(len(given))]:
        return [label if label < len(given) else None for label in range(len(own))], True
    if all(name.isdecimal() for name in own):
        return [int(name) if int(name) < len(given) else None for name in own], True
    return labels, False


def open_shards(
    spec: str | Path, resize: int | None = None, classes: Sequence[str] | None = None
) -> Shards:
    """Open a folder of shards, one local tar, or remote tars such as `https://.../{000..004}.tar`.

    resize, classes: see `Shards`. Remote tars are downloaded into the cache first. Raise UserError
    where that fails.
    """
    from shards.remote import fetch, is_remote

    return Shards(fetch(str(spec)) if is_remote(str(spec)) else spec, resize, classes)


def locate(path: Path, resize: int | None = None, avoid: Path | None = None) -> tuple[Path, Index]:
    """Return folder and index of the fixed-stride shards of a folder or tar, or of a decoded copy.

    avoid: see `shards.decode_cache.fixed_stride_shards`.
    """
    folder = path if path.is_dir() else path.parent
    if (folder / INDEX).is_file():
        index = load_index(folder / INDEX)
        if path != folder:
            shards = tuple(shard for shard in index.shards if shard.name == path.name)
            if not shards:
                raise UserError(f"{path} is not in {folder / INDEX}; move it to another folder")
            index = replace(index, shards=shards)
        for shard in index.shards:
            check_size(folder, shard)
        if index.layout is not None and index.has_side(resize):
            return folder, index
    else:
        index = None
    from shards.decode_cache import check_holds_shards, fixed_stride_shards

    check_holds_shards(path)
    return fixed_stride_shards(path, index, resize, avoid)
