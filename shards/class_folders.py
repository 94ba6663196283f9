"""Finding the images of a tree of class folders, with or without split folders.

Class folders are searched recursively. Changes are detected by name, size and modification
time; a listing of these is kept beside the shards.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from dgm.common.errors import UserError
from dgm.common.formatting import counted
from shards.cli import option
from shards.images import image_suffixes

NUM_NAMED = 20
"""Maximum number of files in a message."""

ROLES = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
# Files and folders of operating systems, ignored like hidden ones.
_JUNK = {"thumbs.db", "desktop.ini", "__macosx", "@eadir", "$recycle.bin", "lost+found"}
_COMMON = "png, jpg, webp, bmp, gif, tif, ppm, ..."


class NoTestImages(UserError):  # noqa: N818
    """A folder has no images for the test split."""


class NoImages(UserError):  # noqa: N818
    """A folder is missing or empty."""


@dataclass(frozen=True)
class ImageFile:
    """An image file in a tree."""

    name: str
    """Relative to the root, with slashes."""
    label: int
    size: int
    """In bytes; -1 for a broken link."""
    mtime_ns: int


@dataclass
class Tree:
    """The images of one split of a folder."""

    root: Path
    classes: tuple[str, ...]
    """Names in label order."""
    files: list[ImageFile]
    """By class, then by name."""
    notes: list[str] = field(default_factory=list)
    """Messages about files that were left out and about where the test images come from."""

    @property
    def listing(self) -> str:
        """Return a JSONL text: class names, then name, size and modification time of each file."""
        lines: list[list[object]] = [list(self.classes)]
        lines += [[file.name, file.size, file.mtime_ns] for file in self.files]
        return "".join(json.dumps(line) + "\n" for line in lines)


def find_images(root: Path, split: str, holdout: float = 0.0) -> Tree:
    """Return the images of a split in a folder that holds class folders, or split folders of them.

    holdout: fraction of the images to use as the test split of a folder that has none.
    Raise UserError where the folder is missing or ambiguous, NoTestImages where it has no test
    split.
    """
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        raise NoImages(f"{root} {what}; give folder:PATH a folder with one folder per class")
    folders, files = _list(root)
    if not folders and any(root.glob("*.tar")):
        raise NoImages(f"{root} holds tars: give {root} as data.shards, not as folder:")
    if not folders and not files:
        raise NoImages(f"{root} holds no class folders; put images into {root}/<class>/")
    splits, notes = _find_splits(root, folders)
    folder = _folder_of(root, splits, split, holdout)
    base = root / folder if folder else root
    classes = _class_names(base, NoTestImages if split == "test" else UserError)
    if splits and split == "test" and not holdout:
        if "train" in splits:
            # Labels of the train split: a class missing in test would shift all others.
            of_train = _class_names(root / splits["train"])
            if unknown := [name for name in classes if name not in of_train]:
                raise UserError(f"{base / unknown[0]} is a class that train lacks; remove it")
            classes = of_train
        if "test" not in splits:
            notes.append(f"test images: those of {base}, as there is no folder test")
    if "test" in splits and "val" in splits:
        notes.append(f"left out: the folder {root / splits['val']}, as there is a folder test")
    found, others = _walk_classes(root, folder, classes)
    if holdout:
        found = [file for file in found if _is_held_out(file.name, holdout) == (split == "test")]
        _check_held_out(root, split, holdout, classes, found)
    outside = [f"{folder}/{name}" if folder else name for name in _list(base)[1]]
    outside += files if folder else []
    if line := _left_out(others, outside):
        notes.append(line)
    return Tree(root, classes, found, notes)


def describe_changes(before: str, now: Tree) -> str:
    """Return how a folder differs from a listing: `3 images added, class dog new`."""
    try:
        classes, *lines = (json.loads(line) for line in before.splitlines())
        old = {str(name): (size, mtime) for name, size, mtime in lines}
    except (ValueError, TypeError):
        return "its images changed"
    new = {file.name: (file.size, file.mtime_ns) for file in now.files}
    counts = {
        "added": len(new.keys() - old.keys()),
        "removed": len(old.keys() - new.keys()),
        "changed": sum(1 for name in old.keys() & new.keys() if old[name] != new[name]),
    }
    parts = [f"{counted(count, 'image')} {how}" for how, count in counts.items() if count]
    parts += [f"class {printable(name)} new" for name in now.classes if name not in classes]
    parts += [f"class {printable(str(name))} gone" for name in classes if name not in now.classes]
    return ", ".join(parts) or "its images changed"


def printable(name: str) -> str:
    """Return a file name escaped so that it can be printed in one line."""
    plain = name.encode("utf-8", "backslashreplace").decode()
    return plain if plain.isprintable() else repr(plain)[1:-1]


def list_names(names: Iterable[str], number: int = 3) -> str:
    """Return the first `number` names, joined by commas."""
    names = list(names)
    return ", ".join([printable(n) for n in names[:number]] + ["..."] * (len(names) > number))


def _find_splits(root: Path, folders: list[str]) -> tuple[dict[str, str], list[str]]:
    """Return the folder of each split, {} if class folders lie in the root, and notes."""
    named = [name for name in folders if name.casefold() in ROLES]
    inside = {name: [sub for sub in _list(root / name)[0] if _holds_images(root / name / sub)]
              for name in named}  # fmt: skip
    nested = [name for name in named if inside[name]]
    others = [name for name in folders if name not in named and _holds_images(root / name)]
    if others and not nested:
        return {}, []  # classes with these names
    common = {n for a in nested for b in nested if a != b for n in {*inside[a]} & {*inside[b]}}
    if others and not common:
        raise UserError(
            f"{root} holds the class folders {list_names(others)} beside {list_names(nested)}, "
            f"which holds class folders itself ({list_names(inside[nested[0]])}); move the former "
            f"into {root}/train/, or the images of {nested[0]} out of its sub-folders if it is a "
            "class"
        )
    if named and not nested and any(_holds_images(root / name) for name in named):
        raise UserError(
            f"{root} holds images in {list_names(named)} but no class folders; if these are "
            f"splits, put images into {root / named[0]}/<class>/, if they are classes, move them "
            f"into {root}/train/"
        )
    splits: dict[str, str] = {}
    for name in named:
        role = ROLES[name.casefold()]
        if role in splits:
            raise UserError(
                f"{root} holds two folders of {role} images, {splits[role]} and {name}; "
                "move one away"
            )
        splits[role] = name
    beside = f"left out: the folders beside {list_names(nested)} ({list_names(others)})"
    return splits, [beside] * bool(others)


def _folder_of(root: Path, splits: dict[str, str], split: str, holdout: float) -> str:
    """Return the folder that holds the images of a split, '' for the root itself."""
    if splits and "train" not in splits and split == "train":
        others = list_names(splits.values())
        raise UserError(f"{root} has no folder 'train' beside the other split ({others}); add it")
    test = splits.get("test", splits.get("val"))
    if holdout:
        if test is not None:
            raise UserError(
                f"holdout is {holdout}: leave it out, since {root / test} holds test images"
            )
        return splits.get("train", "")
    if split == "train":
        return splits.get("train", "")
    if test is None:
        classes = f"add {root}/test/<class>/" if splits else (
            f"move the class folders into {root}/train/ and put test images into "
            f"{root}/test/<class>/"
        )  # fmt: skip
        raise NoTestImages(
            f"{root} has no folder 'test'; hold images out with {option('holdout', '0.1')} (which "
            f"changes the train images, so for a new run), or {classes}"
        )
    return test


def _class_names(folder: Path, error: type[UserError] = UserError) -> tuple[str, ...]:
    names = _list(folder)[0]
    if not names:
        raise error(f"{folder} holds no class folders; put images into {folder}/<class>/")
    return tuple(names)


def _walk_classes(
    root: Path, folder: str, classes: tuple[str, ...]
) -> tuple[list[ImageFile], list[str]]:
    """Return the images of all classes, and the names of other files."""
    found: list[ImageFile] = []
    others: list[str] = []
    for label, name in enumerate(classes):
        relative = f"{folder}/{name}" if folder else name
        if not (root / relative).is_dir():
            continue  # a class of train that is missing in test
        before = len(found)
        for path, status in _walk(root, relative, (os.path.realpath(root),)):
            if status is None:
                others.append(path)
            else:
                found.append(ImageFile(path, label, *status))
        if len(found) == before:
            raise UserError(f"{root / relative} holds no images ({_COMMON}); add some or remove it")
    return found, others


def _walk(
    root: Path, relative: str, above: tuple[str, ...]
) -> Iterator[tuple[str, tuple[int, int] | None]]:
    """Yield each file below a folder, sorted by name, with size and time if it is an image."""
    folder = root / relative
    above = (*above, os.path.realpath(folder))
    for entry in _entries(folder):
        name = f"{relative}/{entry.name}"
        if _is_folder(entry):
            if not entry.is_symlink() or os.path.realpath(entry.path) not in above:
                yield from _walk(root, name, above)
        else:
            yield name, _status(entry)


def _status(entry: os.DirEntry[str]) -> tuple[int, int] | None:
    """Return size and modification time of an image file, None for other suffixes."""
    if os.path.splitext(entry.name)[1].lower() not in image_suffixes():
        return None
    try:
        found = entry.stat()
    except OSError:  # a broken link: reported when it is read
        return -1, 0
    return (found.st_size, found.st_mtime_ns) if stat.S_ISREG(found.st_mode) else None


def _holds_images(folder: Path) -> bool:
    walked = _walk(folder.parent, folder.name, ())
    return any(status is not None for _, status in walked)


def _list(folder: Path) -> tuple[list[str], list[str]]:
    """Return names of sub-folders and of files, sorted, without hidden ones."""
    entries = _entries(folder)
    folders = [entry.name for entry in entries if _is_folder(entry)]
    return folders, [entry.name for entry in entries if not _is_folder(entry)]


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """Return the entries of a folder, sorted by name, without hidden ones."""
    with os.scandir(folder) as entries:
        kept = (e for e in entries if e.name[0] != "." and e.name.casefold() not in _JUNK)
        return sorted(kept, key=lambda entry: entry.name)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_held_out(name: str, fraction: float) -> bool:
    # By the name alone, so that adding images does not move others between splits.
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def _check_held_out(
    root: Path, split: str, holdout: float, classes: tuple[str, ...], found: list[ImageFile]
) -> None:
    """Raise UserError where a class has no train image left, or where nothing is held out."""
    if split == "test" and not found:
        raise UserError(f"holdout is {holdout}, which holds out no image of {root}; raise it")
    missing = set(range(len(classes))) - {file.label for file in found}
    if split == "train" and missing:
        raise UserError(
            f"holdout is {holdout}, which leaves class {printable(classes[min(missing)])} "
            f"of {root} without a train image; lower it"
        )


def _left_out(others: list[str], outside: list[str]) -> str | None:
    """Return a line on files that are not images, and on images outside class folders."""
    suffixes = image_suffixes()
    images = [name for name in outside if os.path.splitext(name)[1].lower() in suffixes]
    others = others + [name for name in outside if name not in images]
    parts = []
    if others:
        noun = "file that is not an image" if len(others) == 1 else "files that are not images"
        parts.append(f"{len(others):,} {noun} ({list_names(others)})")
    if images:
        parts.append(
            f"{counted(len(images), 'image')} outside class folders ({list_names(images)})"
        )
    return f"left out: {', '.join(parts)}" if parts else None
