"""Folders that exist whole or not at all, and the cache folder."""

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
"""Temporary folders being filled, with the parents made for each."""


def cache_root() -> Path:
    """Return `$XDG_CACHE_HOME/dgm`, by default `~/.cache/dgm`; raises UserError without a home."""
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given) / "dgm"
    try:
        if os.environ.get("HOME") == "":
            raise RuntimeError
        return Path.home() / ".cache" / "dgm"
    except RuntimeError:
        raise UserError(
            "HOME is not set and this user has no home folder, so there is no place for caches: "
            "set XDG_CACHE_HOME to a folder of this user's"
        ) from None


def temporary_sibling(final: Path) -> Path:
    """Return a free name `.NAME.tmp-HOST-PID-RANDOM` beside `final`, which tells who owns it."""
    tag = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    return final.parent / f".{final.name}.tmp-{tag}"


def remove_leftovers(final: Path) -> None:
    """Remove temporary siblings of `final` whose process on this host is gone."""
    import psutil  # Not above: reading images needs NumPy alone.

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
    """Remove a file or a folder, where that can be done."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


@contextmanager
def new_folder(
    final: Path, same: str, remedy: str = "choose another folder", swap: bool = False
) -> Iterator[Path]:
    """Yield a temporary folder that becomes `final` at the end of the block, whole or not at all.

    Where another process made `final` in the meantime, its folder stays if its file named `same`
    is byte for byte ours. remedy: what an error advises where `final` cannot be written; swap:
    take the place of a `final` that is other; open maps of its files stay valid.
    Raises UserError where `final` is other, or where nothing can be written.
    """
    made = _make_parents(final, remedy)
    remove_leftovers(final)
    temporary = temporary_sibling(final)
    _unfinished[temporary] = made
    try:
        with _plain_errors(final, remedy):
            temporary.mkdir()
            yield temporary
            _sync_folder(temporary)
            _publish(temporary, final, same, remedy, swap)
    except BaseException:
        _remove_unfinished(temporary, made)
        raise
    finally:
        del _unfinished[temporary]


def remove_unfinished() -> None:
    """Remove every folder that `new_folder` has not finished in this process, before it exits."""
    for temporary, made in list(_unfinished.items()):
        _remove_unfinished(temporary, made)


def _remove_unfinished(temporary: Path, made: list[Path]) -> None:
    remove(temporary)
    for parent in made:
        with suppress(OSError):  # another process may have put something into it
            parent.rmdir()


def _publish(temporary: Path, final: Path, same: str, remedy: str, swap: bool) -> None:
    try:
        os.rename(temporary, final)  # also replaces an empty folder
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        theirs = final / same
        equal = theirs.is_file() and theirs.read_bytes() == (temporary / same).read_bytes()
        if not equal and not swap:
            raise UserError(f"{final} was filled with other data meanwhile; {remedy}") from None
        if not equal:
            _exchange(temporary, final)
        remove(temporary)
    _sync(final.parent)


def _exchange(temporary: Path, final: Path) -> None:
    """Swap two folders, at once where the system can: no moment sees `final` missing."""
    with suppress(OSError, AttributeError):
        here, swapped = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of Linux's renameat2
        libc = ctypes.CDLL(None, use_errno=True)
        if not libc.renameat2(here, os.fsencode(temporary), here, os.fsencode(final), swapped):
            return
    # A network file system, for one, cannot. The old one's name is that of a leftover.
    old = temporary_sibling(final)
    os.rename(final, old)
    os.rename(temporary, final)
    remove(old)


def _make_parents(final: Path, remedy: str) -> list[Path]:
    """Make the parents of `final`; return those that were missing, innermost first."""
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
            raise UserError(f"no space left to write {final}; free some or move it") from error
        if error.errno in _FORBIDDEN and not _is_read(error, final):
            reason = error.strerror
            raise UserError(f"cannot write {final} ({reason}); {remedy}") from error
        raise


def _is_read(error: OSError, final: Path) -> bool:
    """Say whether an error names a file that lies elsewhere, such as an image of the source."""
    name = error.filename
    return isinstance(name, str) and not Path(name).resolve().is_relative_to(final.parent)


def _sync_folder(folder: Path) -> None:
    for path in folder.iterdir():
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
