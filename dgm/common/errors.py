"""Errors that a user can correct: mistakes, and disks that are full, unreadable or failing."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path


class UserError(ValueError):
    """A user's mistake: one line with the thing, its value and what to change."""


_REMEDIES = {
    errno.ENOSPC: "free space there",
    errno.EDQUOT: "free space there or have the quota raised",
    errno.EROFS: "make it writable or choose another place",
    errno.EACCES: "give this user access (chmod, chgrp) or choose another place",
    errno.EPERM: "give this user access (chmod, chgrp) or choose another place",
    errno.EIO: "check the disk",
    errno.ESTALE: "check the network disk",
    errno.ETIMEDOUT: "check the network disk",
    errno.ENXIO: "check the disk",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOTDIR: "choose another place",
    errno.ELOOP: "choose another place",
    errno.EFBIG: "allow larger files (ulimit -f)",
    errno.EMFILE: "allow more open files (ulimit -n)",
    errno.ENFILE: "let this machine open more files",
}


def disk_fault(error: BaseException) -> str | None:
    """Return one line with the file, the reason and the remedy; None if it is not a disk error."""
    if not isinstance(error, OSError) or error.errno is None:
        return None
    names = (error.filename2, error.filename)  # a rename has both: the new name comes first
    name = next((os.fsdecode(n) for n in names if isinstance(n, str | bytes)), "a file")
    remedy, variable = _REMEDIES.get(error.errno), cache_variable(name)
    if variable is not None and error.errno in (*_FORBIDDEN, errno.ENOENT):
        remedy = f"make that cache writable, or set {variable} to another folder"
    elif isinstance(error, PermissionError) and (denied := access_fault(Path(name))):
        return f"{denied}, then run the same command again"
    if remedy is None:
        return None
    why = error.strerror or os.strerror(error.errno)
    return f"{name}: {why}: {remedy}, then run the same command again"


def cache_variable(path: str) -> str | None:
    """Return the environment variable of the cache (torch, Triton or ours) that contains `path`."""
    home = os.path.expanduser("~")
    folders = {
        "TORCHINDUCTOR_CACHE_DIR": os.path.join(tempfile.gettempdir(), "torchinductor_"),
        "TRITON_CACHE_DIR": os.path.join(home, ".triton"),
        "XDG_CACHE_HOME": os.path.join(home, ".cache", "dgm"),
    }
    for variable, default in folders.items():
        if path.startswith(os.environ.get(variable) or default):
            return variable
    return None


_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)


def access_fault(path: Path) -> str | None:
    """Return why this user may not read `path` or enter a folder above it, and the remedy.

    None if it is readable or does not exist.
    """
    for folder in reversed(path.absolute().parents):
        if os.path.isdir(folder) and not os.access(folder, os.X_OK):
            return f"{folder} may not be entered ({_owned(folder)}): {_remedy('a+x', folder)}"
    is_folder = os.path.isdir(path)
    if not os.path.exists(path) or os.access(path, os.R_OK | (os.X_OK if is_folder else 0)):
        return None
    remedy = _remedy("-R a+rX" if is_folder else "a+r", path)
    return f"{path} may not be read ({_owned(path)}): {remedy}"


def check_readable(path: Path) -> None:
    """Raise UserError if `path` exists but this user may not read it."""
    if fault := access_fault(path):
        raise UserError(fault)


def _owned(path: Path) -> str:
    status = os.stat(path)
    try:
        owner = path.owner()
    except KeyError:  # not in the user database
        owner = f"uid {status.st_uid}"
    return f"mode {stat.filemode(status.st_mode)}, owner {owner}"


def _remedy(mode: str, path: Path) -> str:
    group = mode.replace("a+", "g+")
    return f"let its owner run chmod {mode} {path} (for a group: chgrp, then chmod {group})"


@contextlib.contextmanager
def naming(path: os.PathLike[str]) -> Iterator[None]:
    """Set the file name of an OSError that lacks one, as those of write and close do."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = os.fspath(path)
        raise


def one_line(text: str) -> str:
    """Return a message with its lines joined."""
    return " ".join(part.strip() for part in text.splitlines() if part.strip())
