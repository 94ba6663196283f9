"""Folders that are created atomically."""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dgm.common.atomic_io import sync
from dgm.common.errors import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.EBUSY,
    errno.ENAMETOOLONG,
)

_unfinished: dict[Path, list[Path]] = {}
"""Temporary folders being filled, with the parents created for each."""


def temporary_sibling(final: Path) -> Path:
    """Return an unused path `.NAME.tmp-HOST-PID-RANDOM` beside `final`, with its owner's pid."""
    tag = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    return final.parent / f".{final.name}.tmp-{tag}"


def remove_leftovers(final: Path) -> None:
    """Remove temporary siblings of `final` whose process on this host has ended."""
    import psutil  # here, because reading images needs only NumPy

    prefix = f".{final.name}.tmp-{socket.gethostname()}-"
    if not final.parent.is_dir():
        return
    for path in final.parent.iterdir():
        if not path.name.startswith(prefix):
            continue
        pid = path.name[len(prefix) :].split("-")[0]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            remove(path)


def remove(path: Path) -> None:
    """Remove a file or a folder, ignoring errors."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


@contextmanager
def new_folder(
    final: Path, identity: str, remedy: str = "choose another folder", replace: bool = False
) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to `final` at the end of the block, or removed.

    If another process has created `final` meanwhile, its folder is kept if the file named
    `identity` has the same bytes in both. remedy: the end of a message that `final` cannot be
    written. replace: replace a different `final`; memory maps of its files stay valid.
    Raise UserError where `final` has other content, or cannot be written.
    """
    made = _make_parents(final, remedy)
    remove_leftovers(final)
    temporary = temporary_sibling(final)
    _unfinished[temporary] = made
    try:
        with _plain_errors(final, remedy):
            temporary.mkdir()
            yield temporary
            for path in (*temporary.iterdir(), temporary):
                sync(path)
            _publish(temporary, final, identity, remedy, replace)
    except BaseException:
        _remove_unfinished(temporary, made)
        raise
    finally:
        del _unfinished[temporary]


def remove_unfinished() -> None:
    """Remove every unfinished folder of `new_folder` in this process, which is about to exit."""
    for temporary, made in list(_unfinished.items()):
        _remove_unfinished(temporary, made)


def _remove_unfinished(temporary: Path, made: list[Path]) -> None:
    remove(temporary)
    for parent in made:
        with suppress(OSError):  # not empty: another process uses it
            parent.rmdir()


def _publish(temporary: Path, final: Path, identity: str, remedy: str, replace: bool) -> None:
    try:
        os.rename(temporary, final)  # also replaces an empty folder
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        theirs, ours = final / identity, temporary / identity
        equal = theirs.is_file() and theirs.read_bytes() == ours.read_bytes()
        if not equal and not replace:
            raise UserError(f"{final} was filled with other data meanwhile; {remedy}") from None
        if not equal:
            _exchange(temporary, final)
        remove(temporary)
    sync(final.parent)


def _exchange(temporary: Path, final: Path) -> None:
    """Swap two folders, atomically where the file system supports it."""
    with suppress(OSError, AttributeError):
        cwd, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of Linux's renameat2
        libc = ctypes.CDLL(None, use_errno=True)
        if not libc.renameat2(cwd, os.fsencode(temporary), cwd, os.fsencode(final), exchange):
            return
    # Not atomic: some network file systems cannot exchange. An interruption leaves `old`, which
    # `remove_leftovers` removes.
    old = temporary_sibling(final)
    os.rename(final, old)
    os.rename(temporary, final)
    remove(old)


def _make_parents(final: Path, remedy: str) -> list[Path]:
    """Create the parents of `final`; return those that were missing, innermost first."""
    missing = [parent for parent in final.parents if not parent.exists()]
    with _plain_errors(final, remedy):
        final.parent.mkdir(parents=True, exist_ok=True)
    return missing


@contextmanager
def _plain_errors(final: Path, remedy: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise UserError(f"no space left to write {final}; free some, or {remedy}") from error
        if error.errno in _FORBIDDEN and not _is_elsewhere(error, final):
            reason = error.strerror
            raise UserError(f"cannot write {final} ({reason}); {remedy}") from error
        raise


def _is_elsewhere(error: OSError, final: Path) -> bool:
    """Return whether an error names a file outside of `final`'s parent, such as a source image."""
    name = error.filename
    return isinstance(name, str) and not Path(name).resolve().is_relative_to(final.parent)
