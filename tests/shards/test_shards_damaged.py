"""Damaged shards and indexes are read completely or refused in a one-line error."""

from __future__ import annotations

import io
import itertools
import json
import shutil
import tarfile
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from damage import attempt, changed, damaged, examples, flipped
from hypothesis import given
from hypothesis import strategies as st
from tars import encode, members, write_tar

from dgm.common.errors import UserError
from shards.build import ensure
from shards.format import INDEX, load_index
from shards.images import decode_image
from shards.reader import Shards
from shards.sources import Source
from shards.validate_samples import validate_samples
from shards.verify import verify
from shards.write import write_folder

COUNT = 6


def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (COUNT, 8, 8, 3), dtype=np.uint8)


def foreign(extension: str) -> bytes:
    content = members(pixels(), (0, 1, 2, 0, 1, 2), extension)
    with tempfile.TemporaryDirectory() as folder:
        return write_tar(Path(folder) / "a.tar", content).read_bytes()


PNG, NPY = foreign("png"), foreign("npy")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write two tars and their index."""
    folder = tmp_path_factory.mktemp("built")
    labels = [number % 3 for number in range(COUNT)]
    source = Source(
        "test", ("a", "b", "c"), (8, 8, 3), COUNT, lambda: zip(pixels(), labels, strict=True)
    )
    write_folder(source, folder, "train", shard_size=4, progress=False)
    return folder


fresh = itertools.count()


def copied(built: Path, folder: Path, name: str, content: bytes) -> Path:
    """Copy shards, with other content of one file."""
    place = folder / f"{next(fresh)}"
    shutil.copytree(built, place)
    (place / name).write_bytes(content)
    return place


@examples(150)
@given(data=st.data())
def test_a_damaged_index_is_refused_or_reads_the_same(tmp_path: Path, built: Path, data) -> None:
    whole = (built / INDEX).read_bytes()
    if data.draw(st.booleans()):
        content = data.draw(damaged(whole))
    else:
        content = json.dumps(data.draw(changed(json.loads(whole)))).encode()
    path = tmp_path / INDEX
    path.write_bytes(content)
    found = attempt(lambda: load_index(path), path, "build the shards again")
    assert found is None or found == load_index(built / INDEX)


def older(built: Path) -> dict:
    """Return an index without a checksum, as of older versions."""
    content = json.loads((built / INDEX).read_text())
    del content["checksum"]
    return content


def test_an_index_without_checksum_is_read(built: Path, tmp_path: Path) -> None:
    place = copied(built, tmp_path, INDEX, json.dumps(older(built)).encode())
    index = load_index(place / INDEX)
    assert index == load_index(built / INDEX) and index.to_json() == (built / INDEX).read_text()
    assert verify(place).total == COUNT


def everything(shards: Shards) -> tuple:
    where = np.arange(len(shards))
    return shards.images(where).tobytes(), shards.labels(where).tolist(), shards.image_shape


@examples(100)
@given(data=st.data())
def test_an_older_index_must_fit_its_tars(tmp_path: Path, built: Path, data) -> None:
    content = json.dumps(data.draw(changed(older(built)))).encode()
    place = copied(built, tmp_path, INDEX, content)

    def read() -> tuple:
        verify(place)
        return everything(Shards(ensure("test", place)))

    found = attempt(read, place)
    assert found is None or found == everything(Shards(built))


@examples(80)
@given(data=st.data())
def test_a_damaged_tar_is_refused(tmp_path: Path, built: Path, data) -> None:
    whole = (built / "train-00001.tar").read_bytes()
    content = data.draw(damaged(whole))
    place = copied(built, tmp_path, "train-00001.tar", content)
    for read in (lambda: ensure("test", place), lambda: verify(place)):
        if attempt(read, place / "train-00001.tar") is not None:
            assert content == whole


@examples(80)
@given(data=st.data())
def test_a_damaged_sample_is_found_without_the_checksum_of_its_tar(
    tmp_path: Path, built: Path, data
) -> None:
    index = load_index(built / INDEX)
    whole = (built / "train-00001.tar").read_bytes()
    content = data.draw(flipped(whole))
    path = tmp_path / "train-00001.tar"
    path.write_bytes(content)
    assert index.layout is not None
    layout = index.layout
    done = attempt(lambda: validate_samples(path, layout, 4, 2, (8, 8, 3), 3) or True, path)
    if done:  # only pixels, padding and valid labels are not checked
        at = next(k for k in range(len(whole)) if content[k] != whole[k]) % layout.stride
        assert at >= layout.pixel_offset or 512 <= at < 1024


@pytest.mark.parametrize("whole", [PNG, NPY], ids=["png", "npy"])
@examples(120)
@given(data=st.data())
def test_a_damaged_foreign_tar_is_read_or_refused(tmp_path: Path, whole: bytes, data) -> None:
    place = tmp_path / f"{next(fresh)}"
    place.mkdir()
    path = place / "a.tar"
    bit = data.draw(st.booleans())
    path.write_bytes(data.draw(flipped(whole) if bit else damaged(whole)))
    found = attempt(lambda: everything(Shards(place)), place)
    if found is not None and bit:
        images, labels, shape = found
        assert len(labels) == COUNT and shape == (8, 8, 3)
        assert whole is NPY or images == pixels().tobytes()  # a PNG has checksums


FIELDS = {  # of a tar header: offset, size and values to write
    "name": (0, 100, [b"../x.png", b"/etc/x.png", b"a/../../x.png", b"a\nb.png", b"\xff.png",
                      b"\\x.png", b"\x1b[2J.png", b"x" * 100, b"", b".", b"__x.png", b"0000.png"]),
    "size": (124, 12, [b"77777777777\0", b"00000000000\0", b"\xff" * 12, b"\xff" * 11 + b"\x00",
                       b"\x80" + b"\xff" * 11, b"\x80" + b"\0" * 7 + b"\x7f\xff\xff\xff",
                       b"-0000000512\0", b"garbage!!!!!", b"\0" * 12, b"00000000003\0"]),
    "type": (156, 1, [b"1", b"2", b"3", b"4", b"5", b"6", b"7", b"x", b"g", b"L", b"K", b"S", b"V",
                      b"D", b"N", b"M", b"\0", b"\xff"]),
    "prefix": (345, 155, [b"..", b"/", b"a/b", b"x" * 155]),
    "magic": (257, 8, [b"\0" * 8, b"ustar  \0"]),
}  # fmt: skip


@pytest.mark.parametrize("whole", [PNG, NPY], ids=["png", "npy"])
@examples(150)
@given(data=st.data())
def test_a_tar_with_rewritten_headers_is_read_completely_or_refused(
    tmp_path: Path, whole: bytes, data
) -> None:
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        offsets = [info.offset for info in tar]
    content, renamed = bytearray(whole), False
    for at in data.draw(st.lists(st.sampled_from(offsets), min_size=1, max_size=3, unique=True)):
        place, size, values = FIELDS[data.draw(st.sampled_from(sorted(FIELDS)))]
        value = data.draw(st.sampled_from(values))
        # A valid name may hide a sample, in WebDataset too.
        renamed |= value in (b"L", b"K", b"x", b"g", b"", b".", b"x" * 100, b"__x.png")
        content[at + place : at + place + size] = value.ljust(size, b"\0")
        content[at + 148 : at + 156] = b" " * 8
        content[at + 148 : at + 156] = b"%06o\0 " % sum(content[at : at + 512])
    folder = tmp_path / f"{next(fresh)}" / "in"
    folder.mkdir(parents=True)
    (folder / "a.tar").write_bytes(content)
    found = attempt(lambda: everything(Shards(folder)), folder)
    assert found is None or renamed or len(found[1]) == COUNT
    made = {path.name for path in folder.parent.rglob("*")} - {"in", "a.tar"}
    assert found is not None or not made  # nothing was unpacked, and nothing is left


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE]
)
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    stream = io.BytesIO(PNG)
    with tarfile.open(fileobj=stream, mode="a") as tar:
        info = tarfile.TarInfo("9.png")
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
    path = tmp_path / "a.tar"
    path.write_bytes(stream.getvalue())
    with pytest.raises(UserError, match=r"a\.tar holds 9\.png at byte \d+, a link, a device"):
        Shards(path)


@pytest.mark.parametrize("content", [bytes(512), b"x" * 100])
def test_damage_between_samples_is_not_the_end_of_the_tar(tmp_path: Path, content: bytes) -> None:
    with tarfile.open(fileobj=io.BytesIO(PNG)) as tar:
        at = tar.getmembers()[4].offset
    (tmp_path / "a.tar").write_bytes(PNG[:at] + content + PNG[at + len(content) :])
    with pytest.raises(UserError, match=r"a\.tar is damaged at byte"):
        Shards(tmp_path / "a.tar")


def test_no_header_allocates_much_memory(tmp_path: Path) -> None:
    name = tarfile.TarInfo("x")
    name.type, name.size = tarfile.GNUTYPE_LONGNAME, 2**30
    path = tmp_path / "a.tar"
    with path.open("wb") as stream:
        stream.write(name.tobuf(tarfile.GNU_FORMAT))
        stream.truncate(2**31)  # a hole, which takes no space on the disk
    header = {"descr": "|u1", "fortran_order": False, "shape": (2**20, 2**20, 3)}
    npy = io.BytesIO()
    np.lib.format.write_array_header_1_0(npy, header)
    tracemalloc.start()
    with pytest.raises(UserError, match=r"a\.tar is not a plain tar.*header of 1073741824 bytes"):
        Shards(path)
    with pytest.raises(UserError, match=r"x\.npy is not a readable npy file \(0 bytes for"):
        decode_image(npy.getvalue(), "x.npy")
    assert tracemalloc.get_traced_memory()[1] < 2**26
    tracemalloc.stop()


@pytest.mark.parametrize("extension", ["png", "npy", "webp", "jpeg", "bmp"])
@examples(60)
@given(data=st.data())
def test_a_damaged_image_is_read_or_refused(extension: str, data) -> None:
    content = data.draw(damaged(encode(pixels()[0], extension)))
    found = attempt(lambda: decode_image(content, "its name"), "its name")
    assert found is None or (found.pixels.dtype == np.uint8 and found.pixels.ndim == 3)


@examples(20)
@given(data=st.data())
def test_a_damaged_index_in_the_cache_is_made_again(tmp_path: Path, cache: Path, data) -> None:
    path = tmp_path / "a.tar"
    if not path.exists():
        path.write_bytes(NPY)
    whole = everything(Shards(path))
    [known] = (cache / "dgm" / "index").iterdir()
    content = known.read_bytes()
    known.write_bytes(data.draw(damaged(content)))
    assert everything(Shards(path)) == whole
    known.write_bytes(content)
