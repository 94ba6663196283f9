"""Writing tensors as safetensors."""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dgm.common.errors import naming


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str] | None = None
) -> None:
    """Write contiguous tensors as safetensors; raise OSError for disk errors."""
    with naming(path):
        mode = _create_empty(path)
        try:
            save_file(dict(tensors), path, dict(header) if header else None)
        except SafetensorError as error:
            number = re.search(r"\(os error (\d+)\)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
        # safetensors creates its files with mode 0600.
        with contextlib.suppress(PermissionError):  # a file system without modes
            os.chmod(path, mode)


def _create_empty(path: Path) -> int:
    """Create an empty file and return the mode set by umask and the folder's ACL."""
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        return stat.S_IMODE(os.fstat(descriptor).st_mode)
    finally:
        os.close(descriptor)
