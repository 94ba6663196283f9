"""Compressed tars and archives: the error names a command that unpacks them."""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
from tars import members, write_tar

from dgm.common.errors import UserError
from shards.build import ensure
from shards.reader import Shards

PACK = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress}
NAMES = ["a.tar.gz", "a b.tgz", "a.tar", "a.tar.xz", "a.tar.bz2"]


@pytest.fixture
def tar(images, tmp_path: Path) -> Path:
    return write_tar(tmp_path / "whole.tar", members(images(3), range(3)))


@pytest.mark.parametrize("as_folder", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_the_command_in_the_error_unpacks_the_archive(
    tar: Path, images, tmp_path: Path, name: str, as_folder: bool
) -> None:
    folder = tmp_path / "packed"
    folder.mkdir()
    pack = PACK.get(Path(name).suffix, gzip.compress)
    (folder / name).write_bytes(pack(tar.read_bytes()))
    with pytest.raises(UserError, match=r"compressed.*; unpack it with: ") as error:
        ensure("shapes", folder if as_folder else folder / name)
    assert len(str(error.value).splitlines()) == 1
    command = str(error.value).partition("unpack it with: ")[2]
    program = command.split()[0]
    if shutil.which(program) is None:
        pytest.skip(f"no {program} here")
    subprocess.run(command, shell=True, check=True)
    plain = max(folder.iterdir(), key=lambda path: path.stat().st_size)
    if name == "a.tar":
        (folder / name).unlink()
    shards = Shards(ensure("shapes", folder if as_folder else plain))
    assert np.array_equal(shards.images(np.arange(3)), images(3))


def test_zips_and_zstandard_are_known(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("cat/0.png", b"x")
    (tmp_path / "b.tar.zst").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(100))
    place = re.escape(str(tmp_path))
    with pytest.raises(UserError, match=rf"unpack it with: unzip {place}/a.zip -d {place}/a$"):
        ensure("shapes", tmp_path / "a.zip")
    with pytest.raises(UserError, match=rf"with: zstd -dc {place}/b.tar.zst > {place}/b.tar$"):
        ensure("shapes", tmp_path / "b.tar.zst")
