"""Files are written atomically, and errors of a full disk name them."""

from __future__ import annotations

import errno
import os
from io import FileIO
from pathlib import Path

import pytest

from dgm.common.atomic_io import append, replacing, write_whole
from dgm.common.errors import disk_fault, naming


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path):
    path = tmp_path / "file"
    write_whole(path, "before")
    with pytest.raises(OSError) as caught, replacing(path) as partial:
        partial.write_text("half")
        with open("/dev/full", "w") as full:  # always full
            full.write("more")
    assert disk_fault(caught.value) == (
        f"{path}: No space left on device: free space there, then run the same command again"
    )
    assert path.read_text() == "before" and len(list(tmp_path.iterdir())) == 1


def test_a_line_is_appended_whole_or_not_at_all(tmp_path: Path):
    path = tmp_path / "lines"
    with open(path, "ab", buffering=0) as file:
        append(file, "one")

        class Filling(FileIO):
            def write(self, data: object) -> int:
                if len(bytes(data)) < 5:  # type: ignore[call-overload]
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return super().write(bytes(data)[:3])  # type: ignore[call-overload]

        with pytest.raises(OSError) as caught:
            append(Filling(path, "ab"), "second")
        assert caught.value.filename == str(path)
        assert path.read_text() == "one\n"
        append(file, "three")
    assert path.read_text() == "one\nthree\n"


def test_only_errors_of_a_disk_are_disk_faults(tmp_path: Path):
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO):
        with pytest.raises(OSError) as caught, naming(tmp_path / "it"):
            raise OSError(number, os.strerror(number))
        message = disk_fault(caught.value)
        assert str(message).startswith(f"{tmp_path / 'it'}: {os.strerror(number)}: ")
    assert disk_fault(FileNotFoundError(errno.ENOENT, "none", "file")) is None
    assert disk_fault(BrokenPipeError(errno.EPIPE, "none")) is None
    assert disk_fault(OSError("of a library's own")) is None
    assert disk_fault(ValueError()) is None
    renamed = OSError(errno.EROFS, os.strerror(errno.EROFS), ".a.tmp", None, "a")
    assert str(disk_fault(renamed)).startswith("a: Read-only file system: ")
