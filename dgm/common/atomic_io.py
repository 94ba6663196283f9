"""Atomic writing of files and lines; errors name the file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

from dgm.common.errors import naming


@contextlib.contextmanager
def replacing(path: Path, shared: bool = False) -> Iterator[Path]:
    """Yield a temporary path that is renamed to `path`, or removed after an error.

    shared: other processes may write the same file at the same time.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp" if shared else f".{path.name}.tmp")
    try:
        with naming(path):
            yield partial
            os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def write_whole(path: Path, text: str) -> None:
    """Write a text file atomically and fsync it."""
    with replacing(path) as partial:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    with naming(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def append(file: FileIO, text: str) -> None:
    """Append a line to an unbuffered file; truncate it again if that fails."""
    size = os.fstat(file.fileno()).st_size
    rest = memoryview(text.encode() + b"\n")
    try:
        with naming(Path(os.fsdecode(file.name))):
            while rest:  # a disk that fills up accepts only the first part
                rest = rest[file.write(rest) or 0 :]
    except BaseException:
        with contextlib.suppress(OSError):
            os.ftruncate(file.fileno(), size)
        raise
