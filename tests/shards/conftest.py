"""Small sources, shards, and the commands run as processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from tars import encode

from shards.format import Index
from shards.sources import Source
from shards.write import write_folder

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give each test its own cache folder."""
    path = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))
    return path


@pytest.fixture
def images() -> Callable[..., np.ndarray]:
    """Return a maker of random uint8 images [N, H, W, 3]."""

    def make(count: int, height: int = 32, width: int = 32, seed: int = 0) -> np.ndarray:
        shape = (count, height, width, 3)
        return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)

    return make


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Index]:
    """Return a writer of given images as shards into tmp_path / name."""

    def make(
        pixels: np.ndarray, labels: np.ndarray, classes: int = 10, name: str = "shards", **options
    ) -> Index:
        def samples() -> Iterator[tuple[np.ndarray, int]]:
            return zip(pixels, (int(label) for label in labels), strict=True)

        names = tuple(f"class{number}" for number in range(classes))
        source = Source("test", names, tuple(pixels.shape[1:]), len(pixels), samples)
        (tmp_path / name).mkdir()
        return write_folder(source, tmp_path / name, "train", progress=False, **options)

    return make


@pytest.fixture
def class_tree(images) -> Callable[..., Path]:
    """Return a maker of a class-folder tree with `count` PNGs per class."""

    def make(root: Path, classes: tuple[str, ...] = ("cat", "dog"), count: int = 3) -> Path:
        for number, name in enumerate(classes):
            (root / name).mkdir(parents=True)
            for index, image in enumerate(images(count, seed=number)):
                (root / name / f"{index:04d}.png").write_bytes(encode(image, "png"))
        return root

    return make


@pytest.fixture
def start() -> Callable[..., subprocess.Popen]:
    """Return a function that starts `python -m shards.NAME ARGUMENTS`."""

    def run(name: str, *arguments: str | Path, cwd: Path = ROOT) -> subprocess.Popen:
        command = [sys.executable, "-m", f"shards.{name}", *map(str, arguments)]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=cwd, env=env, stdout=pipe, stderr=pipe, text=True)

    return run


@pytest.fixture
def fails(start) -> Callable[..., str]:
    """Return a function that runs a failing command and returns its error line; exit code 2."""

    def run(name: str, *arguments: str | Path) -> str:
        process = start(name, *arguments)
        _, stderr = process.communicate(timeout=60)
        lines = stderr.splitlines()
        assert process.returncode == 2, stderr
        assert len(lines) == 1 and lines[0].startswith("error: "), stderr
        return lines[0]

    return run
