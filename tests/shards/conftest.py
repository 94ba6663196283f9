"""Small sources and shards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from tars import encode, members, write_tar

from shards.decode_cache import DECODED
from shards.sources import Source
from shards.write import write_folder


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
def write(tmp_path: Path) -> Callable[..., Path]:
    """Return a writer of given images as shards into tmp_path / name, which returns that folder."""

    def make(
        pixels: np.ndarray, labels: np.ndarray, classes: int = 10, name: str = "shards", **options
    ) -> Path:
        def samples() -> Iterator[tuple[np.ndarray, int]]:
            return zip(pixels, (int(label) for label in labels), strict=True)

        names = tuple(f"class{number}" for number in range(classes))
        source = Source("test", names, tuple(pixels.shape[1:]), len(pixels), samples)
        (tmp_path / name).mkdir()
        write_folder(source, tmp_path / name, "train", progress=False, **options)
        return tmp_path / name

    return make


@pytest.fixture
def tars(images, tmp_path: Path) -> Iterator[Path]:
    """Write a folder of a tar of four images that need decoding."""
    content = members(images(4), range(4), "png")
    folder = write_tar(tmp_path / "other" / "a.tar", content).parent
    yield folder
    for path in (folder, *folder.glob(f"{DECODED}/**")):
        path.chmod(0o755)


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
