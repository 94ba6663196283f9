"""What long work shows: a labelled bar on a terminal, two lines in a file."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import sys
import termios
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tars import members, write_tar

from dgm.common import progress
from shards.build import build, ensure
from shards.reader import Shards
from shards.remote import fetch
from shards.verify import check_files


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], str]:
    """Return a function that does work with a terminal as stderr, and returns what that shows."""

    def run(work: Callable[[], object]) -> str:
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 300, 0, 0))
        shown: list[bytes] = []

        def collect() -> None:
            try:
                while part := os.read(ours, 4096):
                    shown.append(part)
            except OSError:  # the other end was closed
                pass

        reader = threading.Thread(target=collect)
        reader.start()
        with open(theirs, "w") as stream, monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", stream)
            work()
        reader.join(10)
        os.close(ours)
        return b"".join(shown).decode()

    return run


@pytest.fixture
def tars(images, tmp_path: Path) -> Path:
    return write_tar(tmp_path / "other" / "a.tar", members(images(4), [0] * 4, "png")).parent


def works(tars: Path, tmp_path: Path, tree: Path) -> dict[str, Callable[[], object]]:
    return {
        "building": lambda: build(f"folder:{tree}", "train", tmp_path / "built"),
        "decoding": lambda: Shards(tars),
        "fetching": lambda: fetch(f"pipe:cat {tars}/a.tar"),
        "checking": lambda: check_files(tmp_path / "built"),
    }


def test_lines_in_a_file(
    tars, class_tree, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "QUIET_S", 0.0)
    monkeypatch.setattr(progress, "DELAY_S", 0.0)
    lines = {}
    for name, work in works(tars, tmp_path, class_tree(tmp_path / "tree")).items():
        work()
        lines[name] = capsys.readouterr().err.splitlines()
    out = tmp_path / "built"
    assert lines["building"] == [f"building {out}: 6 images ...", f"built {out}: 6 images in 0.0 s"]
    assert lines["decoding"][:2] == ["decoding 4 images ...", "decoded 4 images in 0.0 s"]
    assert re.match(r"fetching 1 tar into /.*", lines["fetching"][0])
    assert re.match(r"fetched 1 tar into /.* in 0.0 s$", lines["fetching"][1])
    assert lines["checking"] == [
        "checking 1 shard, 41 kB ...", "checked 1 shard, 41 kB in 0.0 s"
    ]  # fmt: skip


def test_a_labelled_bar_on_a_terminal(
    tars, class_tree, tmp_path: Path, terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "QUIET_S", 0.0)
    monkeypatch.setattr(progress, "DELAY_S", 0.0)
    tree = class_tree(tmp_path / "tree")
    labels = {
        "building": f"building {tmp_path / 'built'}: 6 images",
        "decoding": "decoding 4 images",
        "fetching": "fetching tar 1 of 1",
        "checking": "checking 1 shard, 41 kB",
    }
    for name, work in works(tars, tmp_path, tree).items():
        shown = terminal(work)
        assert f"\r{labels[name]}" in shown, (name, shown)
        assert f"{labels[name].split()[0]}ed" not in shown


def test_fast_work_shows_nothing(
    tars: Path, class_tree, tmp_path: Path, terminal, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "QUIET_S", 60.0)
    monkeypatch.setattr(progress, "DELAY_S", 60.0)  # a busy machine is slow
    for name, work in works(tars, tmp_path, class_tree(tmp_path / "tree")).items():
        shown = terminal(work)
        assert shown.startswith("decoded copy of ") if name == "decoding" else not shown
    assert not capsys.readouterr().err


def test_failed_work_prints_no_last_line(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "QUIET_S", 0.01)
    with pytest.raises(ValueError, match="x"), progress.progress("mending", done="mended") as work:
        time.sleep(0.2)
        work.advance()
        raise ValueError("x")
    assert capsys.readouterr().err == "mending ...\n"


def test_quiet_work_is_quiet(tars: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "QUIET_S", 0.0)
    monkeypatch.setattr(progress, "DELAY_S", 0.0)
    fetch(f"pipe:cat {tars}/a.tar", progress=False)
    assert not capsys.readouterr().err


def test_ensure_shows_what_it_checks(tars: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    ensure("test", tars)
    capsys.readouterr()
    monkeypatch.setattr(progress, "QUIET_S", 0.0)
    monkeypatch.setattr(progress, "DELAY_S", 0.0)
    ensure("test", tars)
    assert capsys.readouterr().err.startswith("checking 1 shard, ")
