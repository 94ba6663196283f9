"""A command in a pseudo-terminal, which can be closed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import signal
import struct
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil


class Terminal:
    """A pseudo-terminal whose session is led by the command."""

    def __init__(
        self, words: Sequence[object], environment: Mapping[str, str], cwd: Path, columns: int = 0
    ):
        """Start the command; without columns the terminal does not report its size."""
        self.shown = bytearray()
        self.code: int | None = None
        self.pid, self.master = pty.fork()
        if self.pid == 0:
            os.chdir(cwd)
            os.execve(str(words[0]), [str(word) for word in words], dict(environment))
        if columns:
            size = struct.pack("HHHH", 24, columns, 0, 0)
            fcntl.ioctl(self.master, termios.TIOCSWINSZ, size)
        self.group: list[psutil.Process] = []

    def press(self, key: bytes) -> None:
        """Press a key: b"\\x03" is Ctrl-C."""
        os.write(self.master, key)

    def hang_up(self) -> None:
        """Close the terminal, as a dropped connection does."""
        self.note_children()
        os.close(self.master)
        self.master = -1

    def note_children(self) -> list[psutil.Process]:
        """Return the processes that the command has started."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self.group = psutil.Process(self.pid).children(recursive=True)
        return self.group

    def until(self, happened: Callable[[], bool], timeout_s: float = 90) -> None:
        """Read the output until a condition holds."""
        end = time.monotonic() + timeout_s
        while not happened():
            assert time.monotonic() < end, f"timeout: {self.text[-2000:]}"
            assert self.code is None, f"ended with {self.code}: {self.text[-2000:]}"
            self._read()

    def wait(self, timeout_s: float = 60) -> int:
        """Wait for the end of the command; return its code, negative for a signal."""
        end = time.monotonic() + timeout_s
        while self.code is None:
            assert time.monotonic() < end, f"it does not end: {self.text[-2000:]}"
            self._read()
        while self.master >= 0 and self._read():
            pass
        return self.code

    @property
    def text(self) -> str:
        """The output so far."""
        return self.shown.decode(errors="replace").replace("\r\n", "\n")

    def close(self) -> None:
        """Kill the command and its processes, and close the terminal."""
        left = (
            [*self.note_children(), psutil.Process(self.pid)] if self.code is None else self.group
        )
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        if self.code is None:
            os.waitpid(self.pid, 0)
        if self.master >= 0:
            os.close(self.master)

    def _read(self) -> bool:
        if self.code is None:
            found, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if found else None
        if self.master < 0:
            time.sleep(0.05)
            return False
        if not select.select([self.master], [], [], 0.05)[0]:
            return False
        try:
            part = os.read(self.master, 65536)
        except OSError:  # EIO: the other end is closed
            return False
        self.shown += part
        return bool(part)


def ignores(pid: int, number: signal.Signals) -> bool:
    """Return whether a process ignores a signal."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    mask = int(next(line.split()[1] for line in lines if line.startswith("SigIgn:")), 16)
    return bool(mask >> (number - 1) & 1)
