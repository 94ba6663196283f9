"""Whether something can be written where a user wants it, asked before any work begins."""

from __future__ import annotations

import os
from pathlib import Path

from dgm.errors import UserError

_LONGEST_NAME = 255  # of a file or folder, on usual file systems


def check_folder(option: str, path: Path) -> None:
    """Raise UserError where `path` is no folder that can be written, and none can be made."""
    if os.path.lexists(path) and not path.is_dir():
        raise UserError(f"{option} is {path}, which is no folder: name another")
    _check(option, path)


def check_file(option: str, path: Path) -> None:
    """Raise UserError where no file can be written at `path`, in a folder that there is."""
    if path.is_dir():
        raise UserError(f"{option} is {path}, which is a folder: name a file in it")
    if not os.path.lexists(path.parent):
        raise UserError(f"{option} is {path}, but there is no folder {path.parent}: make it first")
    _check(option, path.absolute().parent, path)


def check_stem(option: str, path: Path) -> None:
    """Raise UserError where no files can be written whose paths begin with `path`."""
    if not path.name:
        raise UserError(f"{option} is {path}, which names no file: give a path without its ending")
    _check(option, path.absolute().parent, path)


def _check(option: str, folder: Path, named: Path | None = None) -> None:
    if any(len(os.fsencode(part)) > _LONGEST_NAME for part in (named or folder).parts):
        raise UserError(
            f"{option} is {named or folder}, with a name of more than {_LONGEST_NAME} bytes: "
            "shorten it"
        )
    standing = next(
        p for p in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(p)
    )
    said = f"{option} is {named or folder}, but {standing}"
    if not standing.is_dir():
        raise UserError(f"{said} is no folder: name another place")
    if os.statvfs(standing).f_flag & os.ST_RDONLY:
        raise UserError(
            f"{said} lies on a read-only file system: mount it writable, or name another place"
        )
    if not os.access(standing, os.W_OK | os.X_OK):
        raise UserError(f"{said} may not be written to: name another place, or change its mode")
