"""A lock on the run folder, released when the process that holds it ends."""

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
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
WAIT = "DGM_LOCK_WAIT_S"
"""Environment variable: seconds to wait for another process to release the lock."""

_RETRY_S = 0.2
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class RunLock:
    """The lock of a run folder: flock on `.lock`, whose text names the holder.

    A file that a killed process left behind is not locked.
    """

    def __init__(self, folder: Path):
        """The folder need not exist yet."""
        self.folder, self.path = folder, folder / LOCK
        self._descriptor: int | None = None

    def take(self) -> None:
        """Acquire the lock; raise UserError naming its holder if `WAIT` seconds are over."""
        timeout_s, began = _timeout_s(), time.monotonic()
        reported = False
        while not self._try():
            holder = self._holder()
            if time.monotonic() - began >= timeout_s:
                raise UserError(
                    f"run.dir {self.folder} is being trained by {holder}: wait until it ends, "
                    "stop it, or choose another run.dir"
                )
            if not reported:
                line = f"waiting up to {timeout_s:g} s for {holder}, which trains {self.folder}"
                print(line, file=sys.stderr, flush=True)
            reported = True
            time.sleep(_RETRY_S)

    def release(self) -> None:
        """Release the lock if it is held, and remove the file."""
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
                    f"the disk of {self.folder} does not support locks ({error.strerror}): make "
                    "sure that nothing else trains there",
                    stacklevel=2,
                )
            if self._is_current(descriptor):
                break
            os.close(descriptor)  # its holder has removed this file
        self._descriptor = descriptor
        with contextlib.suppress(
            OSError
        ):  # the lock holds even if its text does not fit on the disk
            os.ftruncate(descriptor, 0)
            os.write(
                descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode()
            )
        return True

    def _is_current(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), self.path.stat())
        except FileNotFoundError:
            return False

    def _holder(self) -> str:
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            return f"process {found['pid']} on {found['host']}"
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return "another process"  # it has not written its name yet


def _lock(descriptor: int) -> None:
    if fcntl is None:
        raise OSError(errno.ENOSYS, "not on this system")
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _timeout_s() -> float:
    text = os.environ.get(WAIT, "0")
    try:
        return max(0.0, float(text))
    except ValueError:
        raise UserError(f"{WAIT} is '{text}': give seconds") from None
