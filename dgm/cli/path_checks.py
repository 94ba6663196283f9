"""Check that output paths can be written, before any work begins."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from dgm.common.errors import UserError

_OTHER_FORMATS = (
    ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".npy", ".pt", ".zip", ".tar",
)  # fmt: skip
_LONGEST_NAME = 255  # bytes, on usual file systems


def check_folder(option: str, path: Path) -> None:
    """Raise UserError unless `path` is a writable folder or can be created as one."""
    if path.suffix.lower() in (".png", ".npz", ".html", ".json") and not path.exists():
        raise UserError(f"{option} is {path}, but several files are written: name a folder")
    if os.path.lexists(path) and not path.is_dir():
        raise UserError(f"{option} is {path}, which is not a folder: name another path")
    _check(option, path)


def check_file(option: str, path: Path, text: str = "") -> None:
    """Raise UserError unless a file can be written at `path`, in an existing folder.

    `text` is the path as given, which may end with the / of a folder.
    """
    if text.endswith("/") and not path.is_dir():
        raise UserError(f"{option} is {text}, which is a folder: name a file in it")
    if path.is_dir():
        raise UserError(f"{option} is {path}, which is a folder: name a file in it")
    if not os.path.lexists(path.parent):
        raise UserError(f"{option} is {path}, but there is no folder {path.parent}: make it first")
    _check(option, path.absolute().parent, path)


@dataclass(frozen=True)
class Outputs:
    """Output paths of images: a grid and an array, or single files in a new folder."""

    png: Path
    npz: Path
    folder: Path | None = None


def choose_outputs(option: str, text: str) -> Outputs:
    """Return the outputs for x.png, x.npz, a path without ending, or a folder.

    A folder ends with / or exists; it has to be empty, so that no files are overwritten or mixed
    with others. Raise UserError if nothing can be written.
    """
    path = Path(text)
    if text.endswith(("/", os.sep)) or path.is_dir():
        check_folder(option, path)
        existing = sorted(p.name for p in path.iterdir()) if path.is_dir() else []
        if existing:
            raise UserError(
                f"{option} is {text}, a folder with {existing[0]} in it: name a new or empty "
                "folder for single images, or FILE.png for one grid"
            )
        return Outputs(path, path / "images.npz", path)
    if path.suffix.lower() in _OTHER_FORMATS:
        raise UserError(
            f"{option} is {text}: give FILE.png, FILE.npz, a path without ending, or FOLDER/ for "
            "single images"
        )
    stem = path.name[: -len(".png")] if path.suffix.lower() in (".png", ".npz") else path.name
    outputs = Outputs(path.with_name(f"{stem}.png"), path.with_name(f"{stem}.npz"))
    for each in (outputs.png, outputs.npz):
        if each.is_dir():
            raise UserError(f"{option} is {text}, but {each} is a folder: name another file")
    named, other = outputs.png, outputs.npz
    if path.suffix.lower() == ".npz":
        named, other = other, named
    # If only the other one exists, this command did not write it.
    if path.suffix and other.exists() and not named.exists():
        raise UserError(
            f"{option} is {text}, but {other}, which would be written too, exists: move "
            "that, or name another file"
        )
    _check(option, path.absolute().parent, path)
    return outputs


def _check(option: str, folder: Path, named: Path | None = None) -> None:
    if any(len(os.fsencode(part)) > _LONGEST_NAME for part in (named or folder).parts):
        raise UserError(
            f"{option} is {named or folder}, with a name of more than {_LONGEST_NAME} bytes: "
            "shorten it"
        )
    existing = next(
        p for p in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(p)
    )
    problem = f"{option} is {named or folder}, but {existing}"
    if not existing.is_dir():
        raise UserError(f"{problem} is not a folder: name another path")
    if os.statvfs(existing).f_flag & os.ST_RDONLY:
        raise UserError(
            f"{problem} lies on a read-only file system: mount it writable, or name another path"
        )
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{problem} may not be written to: name another path, or change its mode")
