"""Standard streams that survive the loss of their reader.

On a pipe without a reader, a closed terminal or a stream that was closed from the start every
`print` would fail. Here the output is dropped instead, and the command continues.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
import sys
from typing import Any, TextIO

_LOST = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO, errno.ECONNRESET, errno.ESHUTDOWN)
_NUMBERS = {"stdin": 0, "stdout": 1, "stderr": 2}


class _Output(io.FileIO):
    """The raw file of a standard stream, which drops all output once its reader is gone.

    Any other error, such as a full disk, is raised once with the name of the stream. Later output
    is dropped, because Python would try to flush it again at exit.
    """

    lost = False
    stream = "a standard stream"
    _raised = False

    def write(self, data: Any, /) -> int:
        """Write all bytes, also to a slow non-blocking reader; return their number."""
        rest = memoryview(data).cast("B")
        size = rest.nbytes
        while rest:
            try:
                count = super().write(rest)
            except OSError as error:
                if error.errno not in _LOST:
                    if self._raised:
                        break
                    self._raised, error.filename = True, self.stream
                    raise
                self.lost = True
                # C libraries and streams that were opened earlier use this descriptor, too.
                _open_null(self.fileno())
                break
            if count is None:
                select.select([], [self.fileno()], [])
            else:
                rest = rest[count:]
        return size


def keep_streams() -> None:
    """Replace the standard streams by ones that tolerate lost readers and any encoding.

    Streams that were replaced before, as in a notebook, are kept.
    """
    _reserve_numbers()
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115
    for name in ("stdout", "stderr"):
        stream: TextIO | None = getattr(sys, name)
        if stream is None or (stream is getattr(sys, f"__{name}__") and _is_on(stream, name)):
            setattr(sys, name, _lenient(stream, name))


def reader_is_gone() -> bool:
    """Return whether the reader of standard output is gone."""
    buffer = getattr(sys.stdout, "buffer", None)
    output = getattr(buffer, "raw", buffer)
    return isinstance(output, _Output) and output.lost


def _lenient(stream: TextIO | None, name: str) -> TextIO:
    number = _NUMBERS[name]
    if stream is None and not _is_null(number):  # the descriptor is used by another file
        number = os.open(os.devnull, os.O_WRONLY)
    if stream is not None:
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    output = _Output(number, "w", closefd=False)
    output.stream = {"stdout": "standard output", "stderr": "standard error"}[name]
    unbuffered = getattr(stream, "write_through", False)  # python -u, PYTHONUNBUFFERED
    return io.TextIOWrapper(
        output if unbuffered else io.BufferedWriter(output),
        encoding=getattr(stream, "encoding", None) or "utf-8",
        errors="backslashreplace",
        line_buffering=True,  # log files are read while they grow, also of killed processes
        write_through=unbuffered,
    )


def _reserve_numbers() -> None:
    # C libraries print to these descriptors, so no file that is opened later may get one.
    for number in _NUMBERS.values():
        try:
            os.fstat(number)
        except OSError:
            _open_null(number)


def _open_null(number: int) -> None:
    with contextlib.suppress(OSError):
        opened = os.open(os.devnull, os.O_RDWR)
        if opened != number:
            os.dup2(opened, number)
            os.close(opened)
        os.set_inheritable(number, True)


def _is_on(stream: TextIO, name: str) -> bool:
    try:
        return stream.fileno() == _NUMBERS[name]
    except (OSError, ValueError):
        return False


def _is_null(number: int) -> bool:
    return os.path.samestat(os.fstat(number), os.stat(os.devnull))
