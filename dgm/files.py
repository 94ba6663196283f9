"""Files that are written whole or not at all, lines too; errors name the file."""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dgm.errors import naming


@contextlib.contextmanager
def replacing(path: Path, shared: bool = False) -> Iterator[Path]:
    """Give a temporary name to write to; it becomes `path`, or is removed where that fails.

    In a `shared` folder other processes may write the same file meanwhile.
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
    """Write a text file whole or not at all, and bring it to the disk."""
    with replacing(path) as partial:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())


def append(file: FileIO, text: str) -> None:
    """Append a line to an unbuffered file, whole or not at all."""
    size = os.fstat(file.fileno()).st_size
    rest = memoryview(text.encode() + b"\n")
    try:
        with naming(Path(os.fsdecode(file.name))):
            while rest:  # a disk that fills up takes a part first
                rest = rest[file.write(rest) or 0 :]
    except BaseException:
        with contextlib.suppress(OSError):
            os.ftruncate(file.fileno(), size)
        raise


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str] | None = None
) -> None:
    """Write contiguous tensors as safetensors; raises OSError where the disk is at fault."""
    with naming(path):
        mode = _mode_of_new(path)
        try:
            save_file(dict(tensors), path, dict(header) if header else None)
        except SafetensorError as error:
            number = re.search(r"\(os error (\d+)\)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
        # safetensors creates its files with mode 0600.
        with contextlib.suppress(PermissionError):  # of a file system without modes
            os.chmod(path, mode)


def _mode_of_new(path: Path) -> int:
    """Make an empty file and return the mode that umask and the folder's ACL give it."""
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        return stat.S_IMODE(os.fstat(descriptor).st_mode)
    finally:
        os.close(descriptor)
