"""Remote shards, from a server on the loopback and from a command."""

from __future__ import annotations

import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from damage import attempt, examples
from hypothesis import given
from hypothesis import strategies as st

from dgm.common.errors import UserError
from shards.build import ensure
from shards.reader import open_shards
from shards.remote import _MAX_TARS, _expand, is_remote


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serve files without a log line per request."""

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def served(images, write, monkeypatch) -> Iterator[tuple[str, np.ndarray, Path]]:
    """Serve a folder of three shards; yields its URL, the images, and the folder."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    pixels = images(10)
    folder = write(pixels, np.arange(10), shard_size=4)
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", pixels, folder
        server.shutdown()
        thread.join()


def test_remote_shards_equal_local_ones_and_are_fetched_once(served, cache: Path) -> None:
    url, pixels, folder = served
    spec = url + "/train-{00000..00002}.tar"
    shards = open_shards(spec)
    assert np.array_equal(shards.images(np.arange(10)), pixels)
    assert shards.labels(np.arange(10)).tolist() == list(range(10))
    assert (cache / "dgm" / "remote") in shards.folder.parents
    for tar in folder.glob("*.tar"):
        tar.unlink()
    assert np.array_equal(open_shards(spec).images(np.arange(10)), pixels)
    assert np.array_equal(open_shards(ensure("shapes", spec)).images(np.arange(10)), pixels)


def tars(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_a_missing_remote_shard_leaves_no_partial_file(served, cache: Path) -> None:
    url, _, _ = served
    with pytest.raises(UserError, match=r"train-00003.tar could not be fetched.*not found") as e:
        open_shards(url + "/train-{00002..00003}.tar")
    assert len(str(e.value).splitlines()) == 1
    assert tars(cache / "dgm" / "remote") == ["00000.tar"]


def test_a_truncated_remote_shard_leaves_no_partial_file(served, cache: Path) -> None:
    url, _, folder = served
    path = folder / "train-00001.tar"
    path.write_bytes(path.read_bytes()[:7000])
    with pytest.raises(UserError, match=r"train-00001.tar could not be fetched completely"):
        open_shards(f"{url}/train-00001.tar")
    assert tars(cache / "dgm" / "remote") == []


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("http://127.0.0.1:9/a.tar", r"127.0.0.1:9/a.tar could not be fetched \(no connection"),
        ("nothing://a.tar", "nothing://a.tar could not be fetched"),
        ("pipe:false", "pipe:false could not be fetched"),
        ("pipe:echo no tar", "pipe:echo no tar could not be fetched"),
        ("pipe:cat /none 2> /dev/null", "pipe:cat /none 2> /dev/null could not be fetched"),
        ("pipe:true", "pipe:true could not be fetched"),
        ("pipe:echo x | gzip -c", r"the download is compressed, not a plain tar\); give plain"),
    ],
)
def test_a_failing_url_is_named(spec: str, message: str, cache: Path, monkeypatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(UserError, match=message):
        open_shards(spec)
    assert tars(cache) == []


def test_local_paths_are_not_remote() -> None:
    assert not any(map(is_remote, ("data/x", "/a/b.tar", "C:\\x", "folder:x", "pipe")))
    assert all(map(is_remote, ("https://x/a.tar", "s3://b/{0..3}.tar", "pipe:cat x")))


@examples(200)
@given(rest=st.text("{}.,:;0123456789ab/\\$'\"é \n-", max_size=40))
def test_url_lists_are_read_or_refused(rest: str) -> None:
    found = attempt(lambda: _expand(f"https://host/{rest}"))
    assert found is None or 1 <= len(found) <= _MAX_TARS


@pytest.mark.parametrize(
    "spec",
    [
        "https://h/{0..999999999}.tar",
        "https://h/{0..99999999999999999999999}.tar",
        "https://h/" + "{0..9}" * 30,
        "https://h/" + "{a,b}" * 60,
        "https://h/" + "{a,{b,c}}" * 60,
        "https://h/{000..004.tar",
        "https://h/a\n.tar",
    ],
)
def test_malformed_or_huge_url_lists_are_refused_without_their_password(spec: str) -> None:
    with pytest.raises(UserError) as caught:
        _expand(spec.replace("//h", "//me:secret@h"))
    assert "\n" not in str(caught.value) and "secret" not in str(caught.value)
