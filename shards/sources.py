"""Where images come from: `cifar10`, `shapes`, `folder:PATH`."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from dgm.common.atomic_dirs import cache_root
from dgm.common.errors import UserError
from dgm.common.formatting import counted
from shards import shapes
from shards.class_folders import NUM_NAMED, ImageFile, Tree, find_images, shown, some_of
from shards.format import Setting
from shards.images import WHITE, Decoded, decode, ordered_map, parse_background
from shards.index_foreign import PACKED_ENDINGS, how_to_unpack
from shards.option_names import option

try:
    import fcntl
except ImportError:  # not a system of the Unix kind
    fcntl = None  # type: ignore[assignment]

SPLITS = ("train", "test")
LARGEST_SIDE = 4096


@dataclass(frozen=True)
class Source:
    """A finite, ordered set of labelled images."""

    name: str
    classes: tuple[str, ...]
    """Names in label order."""
    image_shape: tuple[int, int, int]
    """(H, W, 3)"""
    length: int
    samples: Callable[[], Iterator[tuple[np.ndarray, int]]]
    """Starts an iteration over (uint8 [H, W, 3], label), the same every time."""
    settings: dict[str, Setting] = field(default_factory=dict)
    """What else decided the images, for the index."""
    listing: str | None = None
    """The image files of a folder, as `class_folders.Tree` lists them."""
    notes: list[str] = field(default_factory=list)
    """What a user should know of the images, a line each; complete once all were read."""

    def __len__(self) -> int:
        return self.length


@dataclass(frozen=True)
class FolderOptions:
    """How the images of a `folder:` source are read."""

    background: str = "white"
    """What transparent images are composed on: white, black or R,G,B."""
    holdout: float = 0.0
    """Fraction of the images that are the test split of a folder without one."""
    skip_bad: bool = False
    """Leave damaged images out."""

    def check(self, source: str) -> None:
        """Raise UserError where a value is out of range, or has no meaning for a source."""
        parse_background(self.background)
        if not 0 <= self.holdout < 1:
            raise UserError(f"holdout is {self.holdout}; choose a fraction from 0 to below 1")
        if self.holdout and not source.startswith("folder:"):
            raise UserError(
                f"holdout is {self.holdout}, but {source} has test images of its own; leave it out"
            )

    @property
    def settings(self) -> dict[str, Setting]:
        """Return what differs from the defaults, for the index."""
        colour, found = parse_background(self.background), dict[str, Setting]()
        if colour != WHITE:
            found["background"] = ",".join(map(str, colour))
        if self.holdout:
            found["holdout"] = self.holdout
        if self.skip_bad:
            found["skip_bad"] = 1
        return found

    @property
    def suffix(self) -> str:
        """Return what a default folder's name adds, so that no two settings share one."""
        settings = self.settings
        settings.pop("skip_bad", None)
        named = "".join(f"-{name}-{value}" for name, value in settings.items())
        return named.replace(",", ".") + "-skip-bad" * self.skip_bad


DEFAULT_OPTIONS = FolderOptions()


def source_name(spec: str) -> str:
    """Return the name of a source, with the path of a folder made absolute.

    Raises UserError where the source is unknown.
    """
    if spec in ("cifar10", "shapes"):
        return spec
    kind, _, path = spec.partition(":")
    if kind == "folder" and path:
        # Not Path.expanduser, which raises for a user who is unknown.
        return f"folder:{Path(os.path.expanduser(path)).resolve()}"
    if spec.lower().endswith((".tar", *PACKED_ENDINGS)) and Path(spec).is_file():
        remedy = how_to_unpack(Path(spec)) or "give it as data.shards"
        raise UserError(f"source '{spec}' is an archive, no source; {remedy}")
    raise UserError(f"unknown source '{spec}'; choose cifar10, shapes or folder:PATH")


def open_source(
    spec: str,
    split: str,
    resize: int | None = None,
    seed: int = 0,
    options: FolderOptions = DEFAULT_OPTIONS,
) -> Source:
    """Open a source by its name, `cifar10`, `shapes` or `folder:PATH`.

    resize: side length that every image is cut and resized to; seed: of the built-in shapes;
    options: of a folder.
    Raises UserError where source or split are unknown, or the data are missing or bad.
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
    return source if resize is None else _resized(source, resize)


def check_resize(resize: int | None) -> None:
    """Raise UserError where images cannot be resized to this side length."""
    if resize is not None and not 1 <= resize <= LARGEST_SIDE:
        raise UserError(f"resize is {resize}; choose a side length of 1 to {LARGEST_SIDE}")


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
    from torchvision.datasets import CIFAR10

    root = cache_root() / "cifar10"
    try:
        root.mkdir(parents=True, exist_ok=True)
        # torchvision prints on stdout.
        with _locked(root / "lock"), _timeout(30), contextlib.redirect_stdout(io.StringIO()):
            data = CIFAR10(str(root), train=split == "train", download=True)
    except (OSError, RuntimeError) as error:
        archive = root / CIFAR10.filename
        raise UserError(
            f"cifar10 could not be downloaded ({' '.join(str(error).split())}); put the file "
            f"{CIFAR10.url} (md5 {CIFAR10.tgz_md5}) at {archive} and run the command again, or use "
            "source shapes (built in) or folder:PATH (images of your own)"
        ) from None
    return Source(
        name="cifar10",
        classes=tuple(data.classes),
        image_shape=(32, 32, 3),
        length=len(data.data),
        samples=lambda: zip(data.data, data.targets, strict=True),
    )


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Let one process in at a time: torchvision downloads straight to the final name."""
    with path.open("w", encoding="utf-8") as stream:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            if fcntl is not None:
                fcntl.flock(stream, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _timeout(seconds: float) -> Iterator[None]:
    """Give connections a time limit: compute nodes often drop packets, and torchvision waits."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _resized(source: Source, side: int) -> Source:
    from PIL import Image

    def resize(sample: tuple[np.ndarray, int]) -> tuple[np.ndarray, int]:
        image = Image.fromarray(sample[0]).resize((side, side), Image.Resampling.BICUBIC)
        return np.asarray(image), sample[1]

    return Source(
        name=source.name,
        classes=source.classes,
        image_shape=(side, side, 3),
        length=len(source),
        samples=lambda: ordered_map(resize, source.samples()),
        settings={**source.settings, "resize": side},
    )


@dataclass(frozen=True)
class _Bad:
    """An image that cannot be taken."""

    file: ImageFile
    error: UserError
    damaged: bool
    """Whether its content is at fault, not the disk or a right to read it."""


class _Folder:
    """The images of a tree of class folders, decoded."""

    def __init__(self, tree: Tree, resize: int | None, options: FolderOptions):
        self.tree, self.resize, self.options = tree, resize, options
        self.background = parse_background(options.background)
        self.notes = list(tree.notes)

    def open(self) -> Source:
        """Return the source. Reads the first image, and all of them to leave damaged ones out."""
        if self.options.skip_bad:
            self._leave_bad_out()
        settings: dict[str, Setting] = {} if self.resize is None else {"resize": self.resize}
        shape = self._first_shape()
        return Source(
            name=f"folder:{self.tree.root}",
            classes=self.tree.classes,
            image_shape=(shape[0], shape[1], 3),
            length=len(self.files),
            samples=lambda: self._samples(shape),
            settings={**settings, **self.options.settings},
            listing=self.listing,
            notes=self.notes,
        )

    @property
    def files(self) -> list[ImageFile]:
        return self.tree.files

    @functools.cached_property
    def listing(self) -> str:
        """Return the listing with the damaged ones, so that a mended one counts as a change."""
        return self.tree.listing

    def _read(self, file: ImageFile) -> Decoded | _Bad:
        path = self.tree.root / file.name
        try:
            content = path.read_bytes()
        except OSError as error:
            why = error.strerror
            unreadable = UserError(f"{path} cannot be read ({why}); check the file")
            return _Bad(file, unreadable, damaged=False)
        try:
            return decode(content, str(path), self.resize, self.background)
        except UserError as error:
            return _Bad(file, error, damaged=True)

    def _read_all(self) -> Iterator[tuple[ImageFile, Decoded | _Bad]]:
        return zip(self.files, ordered_map(self._read, self.files), strict=True)

    def _first_shape(self) -> tuple[int, ...]:
        bad: list[_Bad] = []
        for file in self.files:
            found = self._read(file)
            if isinstance(found, Decoded):
                return found.pixels.shape
            bad.append(found)
        raise self._bad_images(bad)

    def _samples(self, shape: tuple[int, ...]) -> Iterator[tuple[np.ndarray, int]]:
        """Yield all images, or read on after the first that cannot be taken to name them all."""
        bad: list[_Bad] = []
        sizes: Counter[tuple[int, ...]] = Counter()
        names: dict[tuple[int, ...], str] = {}
        transparent, several = [], []
        for number, (file, found) in enumerate(self._read_all(), start=1):
            if isinstance(found, _Bad):
                bad.append(found)
                continue
            sizes[found.pixels.shape] += 1
            names.setdefault(found.pixels.shape, file.name)
            transparent += [file.name] * found.transparent
            several += [file.name] * found.several_frames
            if number == len(self.files):  # who has the last image asks for no more
                self.notes[:] = [*self.tree.notes, *self._of_files(transparent, several)]
            if not bad and len(sizes) == 1 and found.pixels.shape == shape:
                yield found.pixels, file.label
        if bad:
            raise self._bad_images(bad)
        if sizes.keys() != {shape}:
            raise self._differing_sizes(sizes, names)

    def _of_files(self, transparent: list[str], several: list[str]) -> list[str]:
        notes = []
        if transparent:
            number, names = counted(len(transparent), "image"), some_of(transparent)
            notes.append(
                f"{number} with transparent parts ({names}) composed on {self.options.background}; "
                f"{option('background')} chooses another colour"
            )
        if several:
            number, names = counted(len(several), "image"), some_of(several)
            notes.append(f"{number} of several frames or pages ({names}): the first is taken")
        return notes

    def _leave_bad_out(self) -> None:
        _ = self.listing  # of all files
        read = [(file, found) for file, found in self._read_all() if isinstance(found, _Bad)]
        bad = [found for _, found in read]
        if unreadable := [one for one in bad if not one.damaged]:
            raise self._bad_images(unreadable)
        left_out = {file.name for file, _ in read}
        files = [file for file in self.files if file.name not in left_out]
        for label in {file.label for file in self.files} - {file.label for file in files}:
            name = shown(self.tree.classes[label])
            raise UserError(
                f"all images of class {name} in {self.tree.root} are damaged; replace them or "
                "remove the class"
            )
        notes = list(self.tree.notes)
        if bad:
            names = some_of((one.file.name for one in bad), NUM_NAMED)
            notes.append(f"left out: {counted(len(bad), 'damaged image')} ({names})")
        self.tree = replace(self.tree, files=files, notes=notes)
        self.notes[:] = notes

    def _bad_images(self, bad: list[_Bad]) -> UserError:
        """Return an error that names the images that cannot be taken, up to twenty of them."""
        damaged = any(one.damaged for one in bad) and not self.options.skip_bad
        skip = f", or leave damaged ones out by {option('skip-bad')}" if damaged else ""
        if len(bad) == 1:
            return UserError(f"{bad[0].error}{skip}")
        lines = [str(one.error).rpartition("; ")[0] for one in bad[:NUM_NAMED]]
        named = ", ".join(shown(line.removeprefix(f"{self.tree.root}/")) for line in lines)
        more = f", and {len(bad) - NUM_NAMED:,} more" if len(bad) > NUM_NAMED else ""
        return UserError(
            f"{len(bad):,} of {len(self.files):,} images of {self.tree.root} cannot be taken: "
            f"{named}{more}; replace or delete them{skip}"
        )

    def _differing_sizes(
        self, sizes: Counter[tuple[int, ...]], names: dict[tuple[int, ...], str]
    ) -> UserError:
        most = sizes.most_common(5)
        found = ", ".join(
            f"{count:,} of {shape[1]} x {shape[0]} ({shown(names[shape])})" for shape, count in most
        )
        more = f", and {len(sizes) - 5:,} more sizes" if len(sizes) > 5 else ""
        side = min(most[0][0][:2])
        return UserError(
            f"the images of {self.tree.root} have {len(sizes)} sizes: {found}{more}; make all of "
            f"them {side} x {side} by {option('resize', str(side))}, or another side"
        )
