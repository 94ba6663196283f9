"""The PNG grids of a run folder, embedded in a page."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from dgm.common.formatting import counted
from dgm.report.read_run import Run

_MAX_GENERATED = 3
_NAME = re.compile(r"(\d+)(?:-(.+))?")  # 000000256.png, 000000256-reconstructions.png


@dataclass(frozen=True)
class Picture:
    """An embedded PNG, or the reason why there is none."""

    caption: str
    alt: str = ""
    src: str = ""  # data URL
    width: int = 0  # pixels
    height: int = 0
    is_plot: bool = False  # else its pixels are shown as they are
    error: str = ""


def embed(path: Path, caption: str, subject: str, is_plot: bool = False) -> Picture:
    """Return a PNG file as a picture of `subject`, with `error` if it is missing or damaged."""
    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            width, height = image.size
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "it cannot be read" if isinstance(error, OSError) else "it is damaged"
        return Picture(caption, error=f"{path.parent.name}/{path.name} is left out: {reason}.")
    src = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    return Picture(caption, f"{subject}: {caption}", src, width, height, is_plot)


def find_grids(folder: Path) -> dict[str, list[tuple[int, Path]]]:
    """Return the grids of `samples/` by kind, each with its images seen, in their order."""
    found: dict[str, list[tuple[int, Path]]] = {}
    for path in (folder / "samples").glob("*.png"):
        if parts := _NAME.fullmatch(path.stem):
            found.setdefault(parts[2] or "samples", []).append((int(parts[1]), path))
    return {kind: sorted(found[kind]) for kind in sorted(found, key=lambda k: (k != "samples", k))}


def evenly_spaced(grids: list[tuple[int, Path]], count: int) -> list[tuple[int, Path]]:
    """Return `count` evenly spaced grids, including the first and the last."""
    if len(grids) <= count:
        return grids
    if count < 2:
        return grids[len(grids) - count :]
    return [grids[k * (len(grids) - 1) // (count - 1)] for k in range(count)]


def sample_grids(run: Run, count: int) -> list[Picture]:
    """Return `count` sample grids through training, and the newest grid of each other kind."""
    return [
        _of_training(path, kind, seen, run.name)
        for kind, grids in find_grids(run.folder).items()
        for seen, path in evenly_spaced(grids, count if kind == "samples" else 1)
    ]


def newest_grid(run: Run, kind: str) -> list[Picture]:
    """Return the newest grid of one kind; empty if there is none."""
    grids = find_grids(run.folder).get(kind, [])
    return [_of_training(path, kind, seen, run.name) for seen, path in grids[-1:]]


def newest_samples(runs: list[Run]) -> list[Picture]:
    """Return the newest sample grid of each run."""
    grids = [(run, find_grids(run.folder).get("samples", [])[-1:]) for run in runs]
    return [
        _of_training(path, run.name, seen, "samples") for run, own in grids for seen, path in own
    ]


def generated_grids(run: Run) -> list[Picture]:
    """Return the newest files of `generated/`, the newest first."""
    paths = sorted((run.folder / "generated").glob("*.png"), key=lambda path: path.lstat().st_mtime)
    return [embed(path, path.name, run.name) for path in reversed(paths[-_MAX_GENERATED:])]


def _of_training(path: Path, name: str, seen: int, subject: str) -> Picture:
    return embed(path, f"{name}, {counted(seen, 'image')} seen", subject)
