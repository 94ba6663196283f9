"""Finding the images of a tree of class folders, with or without split folders, and its changes.

Class folders are walked recursively. Files that change are found by name, size and time of change,
of which a listing is kept beside the shards.
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
from shards.images import image_suffixes
from shards.option_names import option

NUM_NAMED = 20
"""How many files a message names at most."""

ROLES = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
# What systems and programs leave in folders, beside all that is hidden.
_JUNK = {"thumbs.db", "desktop.ini", "__macosx", "@eadir", "$recycle.bin", "lost+found"}
_COMMON = "png, jpg, webp, bmp, gif, tif, ppm, ..."


class NoTestImages(UserError):  # noqa: N818
    """Report a folder that has no images for the test split."""


class NoImages(UserError):  # noqa: N818
    """Report a folder that is missing, or that holds nothing at all."""


@dataclass(frozen=True)
class ImageFile:
    """An image file as it was found."""

    name: str
    """Relative to the root, with slashes."""
    label: int
    size: int
    """In bytes; -1 of a link that leads nowhere."""
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
    """What was left out, and where test images come from, a line each."""

    @property
    def listing(self) -> str:
        """Return names, sizes and times of change as text: class names, then a line for a file."""
        lines: list[list[object]] = [list(self.classes)]
        lines += [[file.name, file.size, file.mtime_ns] for file in self.files]
        return "".join(json.dumps(line) + "\n" for line in lines)


def find_images(root: Path, split: str, holdout: float = 0.0) -> Tree:
    """Find the images of a split in a folder of class folders, or of split folders of these.

    holdout: fraction of the images that are the test split of a folder that has none.
    Raises UserError where the folder is missing or can be understood in several ways,
    NoTestImages where it has no test split.
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
    try:
        classes = _class_names(base)
    except UserError as error:
        raise NoTestImages(str(error)) if split == "test" else error from None
    if splits and split == "test" and not holdout:
        if "train" in splits:
            # Labels come from the train split, or a class missing in test would shift all others.
            classes = _class_names_of_train(root / splits["train"], base, classes)
        if "test" not in splits:
            notes.append(f"test images: those of {base}, for there is no folder test")
    if splits and "test" in splits and "val" in splits:
        notes.append(f"left out: the folder {root / splits['val']}, for there is a folder test")
    found, others = _walk_classes(root, folder, classes)
    if holdout:
        found = [file for file in found if _is_held_out(file.name, holdout) == (split == "test")]
        _check_held_out(root, split, holdout, classes, found)
    tops = [(f"{folder}/" if folder else "") + name for name in _list(base)[1]]
    tops += files if folder else []
    if line := _left_out(others, tops):
        notes.append(line)
    return Tree(root, classes, found, notes)


def describe_changes(before: str, now: Tree) -> str:
    """Return in words how a folder differs from a listing: `3 images added, class dog new`."""
    try:
        classes, *lines = (json.loads(line) for line in before.splitlines())
        old = {str(name): (size, mtime) for name, size, mtime in lines}
    except (ValueError, TypeError):
        return "its images changed"
    new = {file.name: (file.size, file.mtime_ns) for file in now.files}
    changed = sum(1 for name in old.keys() & new.keys() if old[name] != new[name])
    added, removed = len(new.keys() - old.keys()), len(old.keys() - new.keys())
    parts = [f"{counted(added, 'image')} added"] * bool(added)
    parts += [f"{counted(removed, 'image')} removed"] * bool(removed)
    parts += [f"{counted(changed, 'image')} changed"] * bool(changed)
    parts += [f"class {shown(name)} new" for name in now.classes if name not in classes]
    parts += [f"class {shown(str(name))} gone" for name in classes if name not in now.classes]
    return ", ".join(parts) or "its images changed"


def shown(name: str) -> str:
    """Return a file's name as it can be printed in one line, whatever its bytes are."""
    plain = name.encode("utf-8", "backslashreplace").decode()
    return plain if plain.isprintable() else repr(plain)[1:-1]


def some_of(names: Iterable[str], number: int = 3) -> str:
    """Return the first names of several, with commas."""
    names = list(names)
    return ", ".join([shown(n) for n in names[:number]] + ["..."] * (len(names) > number))


def _find_splits(root: Path, folders: list[str]) -> tuple[dict[str, str], list[str]]:
    """Return the folder of each split, none where class folders lie in the root, and notes."""
    named = [name for name in folders if name.casefold() in ROLES]
    inside = {name: [sub for sub in _list(root / name)[0] if _holds_images(root / name / sub)]
              for name in named}  # fmt: skip
    nested = [name for name in named if inside[name]]
    others = [name for name in folders if name not in named and _holds_images(root / name)]
    if others and not nested:
        return {}, []  # classes that happen to be called so
    common = {n for a in nested for b in nested if a != b for n in {*inside[a]} & {*inside[b]}}
    if others and not common:
        raise UserError(
            f"{root} holds the class folders {some_of(others)} beside {some_of(nested)}, which "
            f"holds class folders itself ({some_of(inside[nested[0]])}); move the former into "
            f"{root}/train/, or the images of {nested[0]} out of its sub-folders if it is a class"
        )
    if named and not nested and any(_holds_images(root / name) for name in named):
        raise UserError(
            f"{root} holds images in {some_of(named)} but no class folders; if these are splits, "
            f"put images into {root / named[0]}/<class>/, if they are classes, move them into "
            f"{root}/train/"
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
    beside = f"left out: the folders beside {some_of(nested)} ({some_of(others)})"
    return splits, [beside] * bool(others)


def _folder_of(root: Path, splits: dict[str, str], split: str, holdout: float) -> str:
    """Return the folder that holds the images of a split, '' for the root itself."""
    if splits and "train" not in splits and split == "train":
        there = some_of(splits.values())
        raise UserError(f"{root} has no folder 'train' beside the other split ({there}); add it")
    test = splits.get("test", splits.get("val"))
    if holdout:
        if test is not None:
            raise UserError(
                f"holdout is {holdout}, but {root / test} holds test images; leave it out"
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
            f"{root} has no folder 'test'; hold images out by {option('holdout', '0.1')} (the "
            f"train images are others then, so for a new run), or {classes}"
        )
    return test


def _class_names(folder: Path) -> tuple[str, ...]:
    names = _list(folder)[0]
    if not names:
        raise UserError(f"{folder} holds no class folders; put images into {folder}/<class>/")
    return tuple(names)


def _class_names_of_train(train: Path, base: Path, found: tuple[str, ...]) -> tuple[str, ...]:
    classes = _class_names(train)
    for name in found:
        if name not in classes:
            raise UserError(f"{base / name} is a class that train lacks; remove it")
    return classes


def _walk_classes(
    root: Path, folder: str, classes: tuple[str, ...]
) -> tuple[list[ImageFile], list[str]]:
    """List the images of all classes, and the names of other files."""
    found: list[ImageFile] = []
    others: list[str] = []
    for label, name in enumerate(classes):
        relative = f"{folder}/{name}" if folder else name
        if not (root / relative).is_dir():
            continue  # a class of train that test lacks
        before = len(found)
        for path, status in _walk(root, relative, (_identity(root),)):
            if status is None:
                others.append(path)
            else:
                found.append(ImageFile(path, label, *status))
        if len(found) == before:
            raise UserError(f"{root / relative} holds no images ({_COMMON}); add some or remove it")
    return found, others


def _walk(
    root: Path, relative: str, above: tuple[tuple[int, int], ...]
) -> Iterator[tuple[str, tuple[int, int] | None]]:
    """Yield each file below a folder in the order of names; size and time of images only."""
    folder = root / relative
    above = (*above, _identity(folder))
    with os.scandir(folder) as entries:
        here = sorted((e for e in entries if not _is_junk(e.name)), key=lambda e: e.name)
    for entry in here:
        name = f"{relative}/{entry.name}"
        if _is_folder(entry):
            if not entry.is_symlink() or _identity(Path(entry.path)) not in above:
                yield from _walk(root, name, above)
        else:
            yield name, _status(entry)


def _status(entry: os.DirEntry[str]) -> tuple[int, int] | None:
    """Return size and time of change of an image file, None where it is none by its name."""
    if os.path.splitext(entry.name)[1].lower() not in image_suffixes():
        return None
    try:
        found = entry.stat()
    except OSError:  # a link that leads nowhere: whoever reads it reports it
        return -1, 0
    return (found.st_size, found.st_mtime_ns) if stat.S_ISREG(found.st_mode) else None


def _holds_images(folder: Path) -> bool:
    walked = _walk(folder.parent, folder.name, ())
    return any(status is not None for _, status in walked)


def _list(folder: Path) -> tuple[list[str], list[str]]:
    """Return names of sub-folders and of files, sorted, without hidden ones."""
    folders: list[str] = []
    files: list[str] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if not _is_junk(entry.name):
                (folders if _is_folder(entry) else files).append(entry.name)
    return sorted(folders), sorted(files)


def _is_junk(name: str) -> bool:
    return name.startswith(".") or name.casefold() in _JUNK


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _identity(folder: Path) -> tuple[int, int]:
    found = folder.stat()
    return found.st_dev, found.st_ino


def _is_held_out(name: str, fraction: float) -> bool:
    # By the name alone: images that are added later leave the others where they are.
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def _check_held_out(
    root: Path, split: str, holdout: float, classes: tuple[str, ...], found: list[ImageFile]
) -> None:
    """Raise UserError where a class keeps no train image, or where nothing is held out."""
    left = {file.label for file in found}
    if split == "test" and not found:
        raise UserError(f"holdout is {holdout}, which holds no image of {root} out; raise it")
    for label, name in enumerate(classes):
        if split == "train" and label not in left:
            raise UserError(
                f"holdout is {holdout}, which leaves class {shown(name)} of {root} no train image; "
                "lower it"
            )


def _left_out(others: list[str], tops: list[str]) -> str | None:
    """Return a line on files that are no images, or lie outside class folders."""
    suffixes = image_suffixes()
    outside = [name for name in tops if os.path.splitext(name)[1].lower() in suffixes]
    others = others + [name for name in tops if name not in outside]
    parts = []
    if others:
        noun = "file that is no image" if len(others) == 1 else "files that are no images"
        parts.append(f"{len(others):,} {noun} ({some_of(others)})")
    if outside:
        parts.append(f"{counted(len(outside), 'image')} outside class folders ({some_of(outside)})")
    return f"left out: {', '.join(parts)}" if parts else None
