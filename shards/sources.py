"""Where images come from: `cifar10`, `shapes`, `folder:PATH`."""

from __future__ import annotations

import contextlib
import io
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from shards import shapes
from shards.errors import ShardError
from shards.folders import cache_root
from shards.images import decode_image, ordered_map

try:
    import fcntl
except ImportError:  # not a system of the Unix kind
    fcntl = None  # type: ignore[assignment]

SPLITS = ("train", "test")
LARGEST_SIDE = 4096
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


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
    settings: dict[str, int] = field(default_factory=dict)
    """What else decided the images, for the index."""

    def __len__(self) -> int:
        return self.length


def source_name(spec: str) -> str:
    """Return the name of a source, with the path of a folder made absolute.

    Raises ShardError where the source is unknown.
    """
    if spec in ("cifar10", "shapes"):
        return spec
    kind, _, path = spec.partition(":")
    if kind == "folder" and path:
        return f"folder:{Path(path).expanduser().resolve()}"
    raise ShardError(f"unknown source '{spec}'; choose cifar10, shapes or folder:PATH")


def open_source(spec: str, split: str, resize: int | None = None, seed: int = 0) -> Source:
    """Open a source by its name, `cifar10`, `shapes` or `folder:PATH`.

    resize: side length that every image is cut and resized to; seed: of the built-in shapes.
    Raises ShardError where source or split are unknown, or the data are missing or bad.
    """
    name = source_name(spec)
    if split not in SPLITS:
        raise ShardError(f"unknown split '{split}'; choose train or test")
    if resize is not None and not 1 <= resize <= LARGEST_SIDE:
        raise ShardError(f"resize is {resize}; choose a side length of 1 to {LARGEST_SIDE}")
    if name.startswith("folder:"):
        return _open_folder(Path(name.removeprefix("folder:")), split, resize)
    source = _open_cifar10(split) if name == "cifar10" else _open_shapes(split, seed)
    return source if resize is None else _resized(source, resize)


def _open_shapes(split: str, seed: int) -> Source:
    if not 0 <= seed < 2**64:
        raise ShardError(f"seed is {seed}; choose one from 0 to 2**64 - 1")
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
        raise ShardError(
            f"cifar10 could not be downloaded to {root} ({error}); "
            "use source shapes (built in) or folder:PATH (images of your own) instead"
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


def _open_folder(root: Path, split: str, resize: int | None) -> Source:
    base, classes = _split_folder(root, split)
    files = _list_images(base, classes)
    expected = _read_image((files[0][0], 0), resize)[0].shape

    def samples() -> Iterator[tuple[np.ndarray, int]]:
        found = ordered_map(lambda file: _read_image(file, resize), files)
        for (path, _), (image, label) in zip(files, found, strict=True):
            if image.shape != expected:
                raise ShardError(
                    f"{path} is {_size(image.shape)} but {files[0][0]} is {_size(expected)}; "
                    "give --resize N to make all images N x N"
                )
            yield image, label

    return Source(
        name=f"folder:{root}",
        classes=classes,
        image_shape=(expected[0], expected[1], 3),
        length=len(files),
        samples=samples,
        settings={} if resize is None else {"resize": resize},
    )


def _read_image(file: tuple[Path, int], resize: int | None) -> tuple[np.ndarray, int]:
    path, label = file
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ShardError(f"{path} cannot be read ({error.strerror}); check the file") from None
    return decode_image(content, str(path), resize), label


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]} x {shape[0]}"


def _split_folder(root: Path, split: str) -> tuple[Path, tuple[str, ...]]:
    """Return the folder of a split, and the classes in label order."""
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        raise ShardError(f"{root} {what}; give folder:PATH a folder with one folder per class")
    if not any((root / name).is_dir() for name in SPLITS):
        if split != "train":
            raise ShardError(f"{root} has no folder '{split}'; make {root / split}/<class>/*")
        return root, _class_names(root)
    if not (root / split).is_dir():
        raise ShardError(f"{root} has no folder '{split}' beside the other split; add it")
    classes = _class_names(root / "train" if (root / "train").is_dir() else root / split)
    # Labels come from the train split, or a class missing in test would shift all that follow.
    for name in _class_names(root / split):
        if name not in classes:
            raise ShardError(f"{root / split / name} is a class that train lacks; remove it")
    return root / split, classes


def _class_names(folder: Path) -> tuple[str, ...]:
    names = [path.name for path in folder.iterdir() if path.is_dir()]
    names = sorted(name for name in names if not name.startswith("."))
    if not names:
        raise ShardError(f"{folder} holds no class folders; put images into {folder}/<class>/")
    return tuple(names)


def _list_images(folder: Path, classes: tuple[str, ...]) -> list[tuple[Path, int]]:
    """List (file, label), by class, then by name."""
    files = []
    for label, name in enumerate(classes):
        if not (folder / name).is_dir():
            continue
        found = sorted(p for p in (folder / name).iterdir() if p.suffix.lower() in SUFFIXES)
        if not found:
            known = ", ".join(suffix[1:] for suffix in SUFFIXES)
            raise ShardError(f"{folder / name} holds no images ({known}); add some or remove it")
        files += [(path, label) for path in found]
    return files
