"""Sources of images: `cifar10`, `shapes`, `folder:PATH`."""

from __future__ import annotations

import contextlib
import io
import os
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from dgm.common.cache import cache_root
from dgm.common.errors import UserError
from dgm.common.formatting import counted
from shards import shapes
from shards.class_folders import NUM_NAMED, ImageFile, Tree, find_images, list_names, printable
from shards.cli import option
from shards.format import Setting
from shards.images import (
    WHITE,
    Decoded,
    crop_and_resize,
    decode_image,
    ordered_map,
    parse_background,
)
from shards.index_foreign import ARCHIVE_SUFFIXES, unpack_command

SPLITS = ("train", "test")
MAX_SIDE = 4096


@dataclass(frozen=True)
class Source:
    """A finite, ordered set of labeled images."""

    name: str
    classes: tuple[str, ...]
    """Names in label order."""
    image_shape: tuple[int, int, int]
    """(H, W, 3)"""
    length: int
    samples: Callable[[], Iterator[tuple[np.ndarray, int]]]
    """Starts an iteration over (uint8 [H, W, 3], label), deterministic."""
    settings: dict[str, Setting] = field(default_factory=dict)
    """Options of the source, for the index."""
    listing: str | None = None
    """The image files of a folder; see `class_folders.Tree`."""
    notes: list[str] = field(default_factory=list)
    """Lines to print about the images; complete once all of them have been read."""

    def __len__(self) -> int:
        return self.length


@dataclass(frozen=True)
class FolderOptions:
    """Options of a `folder:` source."""

    background: str = "white"
    """Colour under transparent images: white, black or R,G,B."""
    holdout: float = 0.0
    """Fraction of the images to use as the test split of a folder without one."""
    skip_bad: bool = False
    """Leave damaged images out."""

    def check(self, source: str) -> None:
        """Raise UserError where a value is out of range or does not apply to a source."""
        parse_background(self.background)
        if not 0 <= self.holdout < 1:
            raise UserError(f"holdout is {self.holdout}; choose a fraction from 0 to below 1")
        if self.holdout and not source.startswith("folder:"):
            raise UserError(
                f"holdout is {self.holdout}, but {source} has test images of its own; leave it out"
            )

    @property
    def settings(self) -> dict[str, Setting]:
        """Return the options that differ from the defaults, for the index."""
        colour, settings = parse_background(self.background), dict[str, Setting]()
        if colour != WHITE:
            settings["background"] = ",".join(map(str, colour))
        if self.holdout:
            settings["holdout"] = self.holdout
        if self.skip_bad:
            settings["skip_bad"] = 1
        return settings

    @property
    def suffix(self) -> str:
        """Return a suffix of the default folder's name, unique for these options."""
        settings = self.settings
        settings.pop("skip_bad", None)
        named = "".join(f"-{name}-{value}" for name, value in settings.items())
        return named.replace(",", ".") + "-skip-bad" * self.skip_bad


DEFAULT_OPTIONS = FolderOptions()


def source_name(spec: str) -> str:
    """Return the name of a source, with an absolute path; raise UserError where it is unknown."""
    if spec in ("cifar10", "shapes"):
        return spec
    kind, _, path = spec.partition(":")
    if kind == "folder" and path:
        # Not Path.expanduser, which raises for an unknown user.
        return f"folder:{Path(os.path.expanduser(path)).resolve()}"
    if spec.lower().endswith((".tar", *ARCHIVE_SUFFIXES)) and Path(spec).is_file():
        remedy = unpack_command(Path(spec)) or "give it as data.shards"
        raise UserError(f"source '{spec}' is an archive, not a source; {remedy}")
    raise UserError(f"unknown source '{spec}'; choose cifar10, shapes or folder:PATH")


def open_source(
    spec: str,
    split: str,
    resize: int | None = None,
    seed: int = 0,
    options: FolderOptions = DEFAULT_OPTIONS,
) -> Source:
    """Open a source by its name, `cifar10`, `shapes` or `folder:PATH`.

    resize: side length that every image is cropped and resized to; seed: of the built-in shapes;
    options: of a folder.
    Raise UserError where source or split are unknown, or the data are missing or bad.
    """
    name = source_name(spec)
    if split not in SPLITS:
        raise UserError(f"unknown split '{split}'; choose train or test")
    check_resize(resize)
    options.check(name)
    if name.startswith("folder:"):
        tree = find_images(Path(name.removeprefix("folder:")), split, options.holdout)
        return _Folder(tree, resize, options).open()
    source = _open_cifar10(split) if name == "cifar10" else _open_shapes(split, seed)
    if resize is None:
        return source

    def resized() -> Iterator[tuple[np.ndarray, int]]:
        return ordered_map(lambda s: (crop_and_resize(s[0], resize), s[1]), source.samples())

    settings = {**source.settings, "resize": resize}
    return replace(source, image_shape=(resize, resize, 3), samples=resized, settings=settings)


def check_resize(resize: int | None) -> None:
    """Raise UserError where a side length is out of range."""
    if resize is not None and not 1 <= resize <= MAX_SIDE:
        raise UserError(f"resize is {resize}; choose a side length of 1 to {MAX_SIDE}")


def _open_shapes(split: str, seed: int) -> Source:
    if not 0 <= seed < 2**64:
        raise UserError(f"seed is {seed}; choose one from 0 to 2**64 - 1")
    return Source(
        name="shapes",
        classes=shapes.CLASSES,
        image_shape=(shapes.SIDE, shapes.SIDE, 3),
        length=shapes.NUM_IMAGES[split],
        samples=lambda: shapes.render_all(split, seed),
        settings={"seed": seed},
    )


def _open_cifar10(split: str) -> Source:
    from filelock import UnixFileLock
    from torchvision.datasets import CIFAR10

    root = cache_root() / "cifar10"
    # torchvision downloads to the final file name: one process at a time. It has no timeout, and
    # compute nodes often drop packets.
    lock = UnixFileLock(root / "lock", fallback_to_soft=False)
    timeout = socket.getdefaulttimeout()
    try:
        socket.setdefaulttimeout(30)
        root.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError):  # some network file systems have no locks
            lock.acquire()
        # torchvision prints on stdout.
        with contextlib.redirect_stdout(io.StringIO()):
            data = CIFAR10(str(root), train=split == "train", download=True)
    except (OSError, RuntimeError) as error:
        archive = root / CIFAR10.filename
        raise UserError(
            f"cifar10 could not be downloaded ({' '.join(str(error).split())}); put the file "
            f"{CIFAR10.url} (md5 {CIFAR10.tgz_md5}) at {archive} and run the command again, or use "
            "source shapes (built in) or folder:PATH (your own images)"
        ) from None
    finally:
        socket.setdefaulttimeout(timeout)
        lock.release()
    return Source(
        name="cifar10",
        classes=tuple(data.classes),
        image_shape=(32, 32, 3),
        length=len(data.data),
        samples=lambda: zip(data.data, data.targets, strict=True),
    )


class _UnreadableError(UserError):
    """A file that cannot be read, unlike one whose content is damaged."""


@dataclass
class _Folder:
    """The images of a tree of class folders, decoded."""

    tree: Tree
    resize: int | None
    options: FolderOptions

    def open(self) -> Source:
        """Return the source. Reads the first image, with `skip_bad` all of them."""
        listing = self.tree.listing  # before damaged images are left out: repairing one is a change
        if self.options.skip_bad:
            self._skip_damaged()
        settings: dict[str, Setting] = {} if self.resize is None else {"resize": self.resize}
        shape, notes = self._first_shape(), list(self.tree.notes)
        return Source(
            name=f"folder:{self.tree.root}",
            classes=self.tree.classes,
            image_shape=(shape[0], shape[1], 3),
            length=len(self.tree.files),
            samples=lambda: self._samples(shape, notes),
            settings={**settings, **self.options.settings},
            listing=listing,
            notes=notes,
        )

    def _read(self, file: ImageFile) -> Decoded | UserError:
        path, background = self.tree.root / file.name, parse_background(self.options.background)
        try:
            return decode_image(path.read_bytes(), str(path), self.resize, background)
        except OSError as error:
            return _UnreadableError(f"{path} cannot be read ({error.strerror}); check the file")
        except UserError as error:
            return error

    def _read_all(self) -> Iterator[tuple[ImageFile, Decoded | UserError]]:
        return zip(self.tree.files, ordered_map(self._read, self.tree.files), strict=True)

    def _first_shape(self) -> tuple[int, ...]:
        bad: list[UserError] = []
        for file in self.tree.files:
            image = self._read(file)
            if isinstance(image, Decoded):
                return image.pixels.shape
            bad.append(image)
        raise self._bad_images(bad)

    def _samples(
        self, shape: tuple[int, ...], notes: list[str]
    ) -> Iterator[tuple[np.ndarray, int]]:
        """Yield all images and set `notes`; after the first unusable image, only collect errors."""
        bad: list[UserError] = []
        sizes: Counter[tuple[int, ...]] = Counter()
        names: dict[tuple[int, ...], str] = {}
        transparent, several = [], []
        for number, (file, image) in enumerate(self._read_all(), start=1):
            if isinstance(image, UserError):
                bad.append(image)
                continue
            sizes[image.pixels.shape] += 1
            names.setdefault(image.pixels.shape, file.name)
            transparent += [file.name] * image.transparent
            several += [file.name] * image.several_frames
            if number == len(self.tree.files):  # the consumer may stop after the last image
                notes[:] = [*self.tree.notes, *self._file_notes(transparent, several)]
            if not bad and len(sizes) == 1 and image.pixels.shape == shape:
                yield image.pixels, file.label
        if bad:
            raise self._bad_images(bad)
        if sizes.keys() != {shape}:
            raise self._differing_sizes(sizes, names)

    def _file_notes(self, transparent: list[str], several: list[str]) -> list[str]:
        notes = []
        if transparent:
            number, names = counted(len(transparent), "image"), list_names(transparent)
            notes.append(
                f"{number} with transparent parts ({names}) composited on {self.options.background}"
                f"; {option('background')} chooses another colour"
            )
        if several:
            number, names = counted(len(several), "image"), list_names(several)
            notes.append(f"{number} of several frames or pages ({names}): the first is used")
        return notes

    def _skip_damaged(self) -> None:
        bad = {file: image for file, image in self._read_all() if isinstance(image, UserError)}
        if unreadable := [error for error in bad.values() if isinstance(error, _UnreadableError)]:
            raise self._bad_images(unreadable)
        files = [file for file in self.tree.files if file not in bad]
        for label in {file.label for file in self.tree.files} - {file.label for file in files}:
            name = printable(self.tree.classes[label])
            raise UserError(
                f"all images of class {name} in {self.tree.root} are damaged; replace them or "
                "remove the class"
            )
        if bad:
            names = list_names((file.name for file in bad), NUM_NAMED)
            self.tree.notes.append(f"left out: {counted(len(bad), 'damaged image')} ({names})")
        self.tree = replace(self.tree, files=files)

    def _bad_images(self, bad: Sequence[UserError]) -> UserError:
        """Return an error with the images that cannot be used, up to `NUM_NAMED`."""
        damaged = not all(isinstance(error, _UnreadableError) for error in bad)
        may_skip = damaged and not self.options.skip_bad
        skip = f", or leave damaged ones out with {option('skip-bad')}" if may_skip else ""
        if len(bad) == 1:
            return UserError(f"{bad[0]}{skip}")
        lines = [str(error).rpartition("; ")[0] for error in bad[:NUM_NAMED]]
        named = ", ".join(printable(line.removeprefix(f"{self.tree.root}/")) for line in lines)
        more = f", and {len(bad) - NUM_NAMED:,} more" if len(bad) > NUM_NAMED else ""
        return UserError(
            f"{len(bad):,} of {len(self.tree.files):,} images of {self.tree.root} cannot be used: "
            f"{named}{more}; replace or delete them{skip}"
        )

    def _differing_sizes(
        self, sizes: Counter[tuple[int, ...]], names: dict[tuple[int, ...], str]
    ) -> UserError:
        common = sizes.most_common(5)
        listed = ", ".join(
            f"{count:,} of {shape[1]} x {shape[0]} ({printable(names[shape])})"
            for shape, count in common
        )
        more = f", and {len(sizes) - 5:,} more sizes" if len(sizes) > 5 else ""
        side = min(common[0][0][:2])
        return UserError(
            f"the images of {self.tree.root} have {len(sizes)} sizes: {listed}{more}; resize all "
            f"to {side} x {side} with {option('resize', str(side))}, or to another side"
        )
