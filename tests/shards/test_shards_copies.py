"""Decoded copies in caches that several users share."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tars import members, write_tar

from shards.build import ensure
from shards.decode_cache import DECODED
from shards.format import INDEX
from shards.reader import Shards

WITHOUT_RIGHTS = Path(__file__).parents[1] / "support" / "without_rights.py"
READ = """
import sys
import numpy as np
from shards.build import ensure
from shards.reader import open_shards
shards = open_shards(ensure("test", sys.argv[1]))
print(shards.folder, shards.images(np.arange(len(shards))).sum())
"""
OTHER_USER = 12345  # a user ID

only_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may change the owner of files")


@pytest.fixture
def read(run_script, cache: Path, images) -> Callable[[Path], tuple[Path, list[str]]]:
    """Return a function that reads shards without root's rights: their folder, lines of stderr."""
    script = cache / "read.py"
    script.write_text(READ)

    def run(folder: Path) -> tuple[Path, list[str]]:
        variables = {"XDG_CACHE_HOME": str(cache)}
        done = run_script(WITHOUT_RIGHTS, script, folder, variables=variables)
        assert done.code == 0, done.stderr
        where, total = done.stdout.split()
        assert int(total) == images(4).sum()
        return Path(where), done.stderr.splitlines()

    return run


def give_away(folder: Path, mode: int) -> None:
    """Change the owner and the mode of a copy."""
    for path in (folder, *folder.iterdir()):
        path.chmod(mode | (0o111 if path.is_dir() and mode else 0))
        os.chown(path, OTHER_USER, OTHER_USER)


@pytest.mark.slow
@only_root
@pytest.mark.parametrize(
    "harm", ["files unreadable", "folder unreadable", "index cut", "tar cut", "bit flipped"]
)
def test_a_damaged_copy_of_another_user_is_decoded_again(
    tars: Path, read, cache: Path, harm: str
) -> None:
    copy = Shards(tars).folder
    if harm == "folder unreadable":
        give_away(copy.parent, 0o000)
    else:
        path = copy / (INDEX if harm == "index cut" else "train-00000.tar")
        content = bytearray(path.read_bytes())
        if harm == "bit flipped":
            content[2000] ^= 1
        elif harm.endswith("cut"):
            del content[100:]
        path.write_bytes(content)
        give_away(copy, 0o000 if harm == "files unreadable" else 0o644)
    found, lines = read(tars)
    assert found.parent == cache / "dgm" / "decoded"
    assert f"decoded copy of {tars}: {found} (4 images, " in lines[-1]
    again, lines = read(tars)
    assert again == found and not lines


@pytest.mark.slow
@only_root
def test_a_cache_shared_by_several_users(tars: Path, read, cache: Path) -> None:
    """Test a copy and an index of another user that cannot be read, in a shared cache."""
    tars.chmod(0o555)
    place, _ = read(tars)
    assert place.parent == cache / "dgm" / "decoded"
    give_away(place, 0o000)
    found, _ = read(tars)
    assert found.parent == cache / "dgm" / f"decoded-{os.geteuid()}"
    assert read(tars) == (found, [])


@only_root
def test_an_unreadable_index_in_the_cache_is_not_used(
    images, tmp_path: Path, cache: Path, read
) -> None:
    folder = write_tar(tmp_path / "other" / "a.tar", members(images(4), range(4))).parent
    assert read(folder) == (folder, [])
    kept = cache / "dgm" / "index"
    give_away(kept, 0o000)
    kept.chmod(0o555)  # as in a shared folder with the sticky bit
    assert read(folder) == (folder, [])
    [known] = (cache / "dgm" / f"index-{os.geteuid()}").iterdir()
    assert read(folder) == (folder, []) and known.is_file()


def test_a_truncated_own_copy_is_decoded_again(tars: Path, images) -> None:
    copy = Shards(tars).folder
    (copy / INDEX).write_text("{")
    with pytest.warns(UserWarning, match="decoded copy .* is not used: .*damaged"):
        shards = Shards(tars)
    assert shards.folder == copy
    assert np.array_equal(shards.images(np.arange(4)), images(4))


@pytest.mark.parametrize("umask", [0o002, 0o027])
def test_copies_follow_umask_and_group(tars: Path, cache: Path, umask: int) -> None:
    group = 4321 if os.geteuid() == 0 else os.getegid()
    os.chown(tars, -1, group)
    tars.chmod(0o2775)
    before = os.umask(umask)
    try:
        copy = Shards(tars).folder
    finally:
        os.umask(before)
    assert copy.parent == tars / DECODED
    for path in (copy.parent, copy, *copy.iterdir()):
        mode = path.stat().st_mode
        assert stat.S_IMODE(mode) & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask
        assert path.stat().st_gid == group


def test_the_copy_and_its_size_are_printed(tars: Path, capsys) -> None:
    copy = Shards(tars).folder
    [line] = capsys.readouterr().err.splitlines()
    assert line == f"decoded copy of {tars}: {copy} (4 images, 30.7 kB)"
    Shards(tars)
    assert not capsys.readouterr().err


def test_transparent_images_of_tars_are_composited_on_white(tmp_path: Path, capsys) -> None:
    content = {}
    for number, alpha in enumerate((255, 0, 128)):
        with io.BytesIO() as file:
            Image.new("RGBA", (8, 8), (200, 0, 0, alpha)).save(file, "PNG")
            content |= {f"{number}.cls": b"0", f"{number}.png": file.getvalue()}
    folder = write_tar(tmp_path / "clear" / "a.tar", content).parent
    found = Shards(ensure("test", folder))
    corners = found.images(np.arange(3))[:, 0, 0].tolist()
    assert corners[:2] == [[200, 0, 0], [255, 255, 255]] and corners[2][1] in (127, 128)
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == "2 images with transparent parts composited on white"
