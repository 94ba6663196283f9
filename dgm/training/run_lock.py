"""One process at a time trains a run folder: a lock that ends with the process that holds it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import sys
import time
import warnings
from pathlib import Path

from dgm.common.errors import UserError

try:
    import fcntl
except ImportError:  # not a system of the Unix kind
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
WAIT = "DGM_LOCK_WAIT_S"
"""Variable that says for how long to wait for another process to end."""

_LOOK_AGAIN_S = 0.2
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class RunLock:
    """The lock of a run folder: `.lock` in it names who holds it, the system who really does.

    A file that a killed process left behind is free.
    """

    def __init__(self, folder: Path):
        """Take the folder, which need not exist yet."""
        self.folder, self.path = folder, folder / LOCK
        self._descriptor: int | None = None

    def take(self) -> None:
        """Hold the lock until `release`; raises UserError naming who holds it."""
        patience, began = _patience(), time.monotonic()
        told = False
        while not self._try():
            holder = self._holder()
            if time.monotonic() - began >= patience:
                raise UserError(
                    f"run.dir {self.folder} is being trained by {holder}: wait until it ends, "
                    "stop it, or choose another run.dir"
                )
            if not told:
                say = f"waiting up to {patience:g} s for {holder}, which trains {self.folder}"
                print(say, file=sys.stderr, flush=True)
            told = True
            time.sleep(_LOOK_AGAIN_S)

    def release(self) -> None:
        """Let go of the lock, if it is held; the file goes too."""
        if self._descriptor is None:
            return
        with contextlib.suppress(OSError):
            self.path.unlink()
        os.close(self._descriptor)
        self._descriptor = None

    def _try(self) -> bool:
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                _lock(descriptor)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    os.close(descriptor)
                    if isinstance(error, BlockingIOError):
                        return False
                    raise
                warnings.warn(
                    f"the disk of {self.folder} knows no locks ({error.strerror}): see to it that "
                    "nothing else trains there",
                    stacklevel=2,
                )
            if self._is_still(descriptor):
                break
            os.close(descriptor)  # of a file that its holder removed as it ended
        self._descriptor = descriptor
        with contextlib.suppress(OSError):  # it is held, whether or not its text fits on the disk
            os.ftruncate(descriptor, 0)
            os.write(descriptor, json.dumps(_myself()).encode())
        return True

    def _is_still(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), self.path.stat())
        except FileNotFoundError:
            return False

    def _holder(self) -> str:
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            return f"process {found['pid']} on {found['host']}"
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return "another process"  # which has not written its name yet


def _lock(descriptor: int) -> None:
    if fcntl is None:
        raise OSError(errno.ENOSYS, "this system has none")
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _myself() -> dict[str, object]:
    return {"pid": os.getpid(), "host": socket.gethostname()}


def _patience() -> float:
    told = os.environ.get(WAIT, "0")
    try:
        return max(0.0, float(told))
    except ValueError:
        raise UserError(f"{WAIT} is '{told}': give seconds") from None
