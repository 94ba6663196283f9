"""Progress of long work on shards; `tests/test_progress.py` tests bars and lines in general."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from terminal import Terminal

from dgm.common import progress
from shards.build import build, ensure
from shards.reader import Shards
from shards.remote import fetch
from shards.verify import check_files

ROOT = Path(__file__).resolve().parents[2]
ON_TERMINAL = """
from dgm.common import progress
progress.DELAY_S = 0
from shards.remote import fetch
fetch("pipe:cat a.tar")
"""


@pytest.fixture
def lines(capsys, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], list[str]]:
    """Return a function that runs work and returns its stderr lines, which short work has too."""
    monkeypatch.setattr(progress, "QUIET_S", 0.0)

    def run(work: Callable[[], object]) -> list[str]:
        work()
        output = capsys.readouterr().err
        return re.sub(r" in \d+\.\d s$", " in T s", output, flags=re.MULTILINE).splitlines()

    return run


def test_work_is_named_with_its_size(tars: Path, class_tree, tmp_path: Path, lines) -> None:
    out, tree = tmp_path / "built", class_tree(tmp_path / "tree")
    built = lines(lambda: build(f"folder:{tree}", "train", out))
    assert built == [f"building {out}: 6 images ...", f"built {out}: 6 images in T s"]
    decoded = lines(lambda: Shards(tars))
    assert decoded[:2] == ["decoding 4 images ...", "decoded 4 images in T s"]
    began, ended = lines(lambda: fetch(f"pipe:cat {tars}/a.tar"))
    assert re.match(r"fetching 1 tar into /.* \.\.\.$", began)
    assert re.match(r"fetched 1 tar into /.* in T s$", ended)
    checked = lines(lambda: check_files(out))
    assert checked == ["checking 1 shard, 41 kB ...", "checked 1 shard, 41 kB in T s"]
    assert lines(lambda: ensure("test", tars))[0].startswith("checking 1 shard, ")
    assert not lines(lambda: fetch(f"pipe:head -c 99999 {tars}/a.tar", progress=False))


def test_a_terminal_shows_the_tar_that_is_fetched(tars: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    terminal = Terminal([sys.executable, "-c", ON_TERMINAL], environment, tars, columns=100)
    try:
        assert terminal.wait() == 0
        assert "\rfetching tar 1 of 1" in terminal.text, terminal.text
    finally:
        terminal.close()
