"""A lock of a run folder, for one training process at a time; it ends with its process."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import sys
import warnings
from pathlib import Path

from filelock import Timeout, UnixFileLock

from dgm.common.errors import UserError
from dgm.common.json_files import read_object

LOCK = ".lock"
WAIT = "DGM_LOCK_WAIT_S"
"""Environment variable: seconds to wait for another process to end."""

_POLL_S = 0.2
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class RunLock:
    """The lock of a run folder: the file `.lock`, which also holds the pid and host of its owner.

    The kernel releases the lock of a killed process; the file that remains does not matter.
    """

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / LOCK
        # Not a soft lock, which would stay locked after its process was killed.
        self._lock = UnixFileLock(self.path, thread_local=False, fallback_to_soft=False)
        self._held = False

    def take(self) -> None:
        """Acquire the lock; raise UserError naming its owner if that takes too long."""
        wait_s = _wait_s()
        try:
            self._acquire(0)
        except Timeout:
            if wait_s > 0:
                message = (
                    f"waiting up to {wait_s:g} s for {self._owner()}, which trains {self.folder}"
                )
                print(message, file=sys.stderr, flush=True)
            try:
                self._acquire(wait_s)
            except Timeout:
                raise UserError(
                    f"run.dir {self.folder} is being trained by {self._owner()}: wait until it "
                    "ends, stop it, or choose another run.dir"
                ) from None
        self._held = True
        with contextlib.suppress(OSError):  # the lock is held even if its text cannot be written
            owner = {"pid": os.getpid(), "host": socket.gethostname()}
            self.path.write_text(json.dumps(owner), encoding="utf-8")

    def release(self) -> None:
        """Remove the file and release the lock, if it is held."""
        if not self._held:
            return
        self._held = False
        with contextlib.suppress(OSError):  # before the release: waiting processes notice it
            self.path.unlink()
        self._lock.release()

    def _acquire(self, timeout: float) -> None:
        try:
            self._lock.acquire(timeout, poll_interval=_POLL_S)
        except OSError as error:
            if isinstance(error, Timeout) or error.errno not in _NO_LOCKS:
                raise
            warnings.warn(
                f"the disk of {self.folder} does not support locks ({error.strerror}): make sure "
                "that no other process trains there",
                stacklevel=3,
            )

    def _owner(self) -> str:
        owner = read_object(self.path)
        if not owner:  # it has not written its pid yet
            return "another process"
        return f"process {owner.get('pid')} on {owner.get('host')}"


def _wait_s() -> float:
    text = os.environ.get(WAIT, "0")
    try:
        return max(0.0, float(text))
    except ValueError:
        raise UserError(f"{WAIT} is '{text}': give seconds") from None
