"""The PNG grids of a run folder, embedded."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

from PIL import Image

from dgm.common.formatting import counted
from dgm.report.markup import Html, element

_THROUGH_TRAINING = 5  # grids of one kind that are shown
_GENERATED = 3
_NAME = re.compile(r"(\d+)(?:-(.+))?")  # 000000256.png, 000000256-reconstructions.png


def kinds(folder: Path) -> dict[str, list[tuple[int, Path]]]:
    """Find the grids of `samples/` by kind, each with the images seen, in their order."""
    found: dict[str, list[tuple[int, Path]]] = {}
    for path in (folder / "samples").glob("*.png"):
        if parts := _NAME.fullmatch(path.stem):
            found.setdefault(parts[2] or "samples", []).append((int(parts[1]), path))
    first = sorted(found, key=lambda kind: (kind != "samples", kind))
    return {kind: sorted(found[kind]) for kind in first}


def some_of(grids: list[tuple[int, Path]], wanted: int) -> list[tuple[int, Path]]:
    """Choose the last, the first, and some at equal distances in between."""
    if len(grids) <= wanted:
        return grids
    if wanted < 2:
        return grids[len(grids) - wanted :]
    return [grids[k * (len(grids) - 1) // (wanted - 1)] for k in range(wanted)]


def show_samples(folder: Path, of: str, wanted: int = _THROUGH_TRAINING) -> Html | None:
    """Show grids of `samples/` through training, the newest only of any but plain samples."""
    parts = []
    for kind, grids in kinds(folder).items():
        shown = some_of(grids, wanted if kind == "samples" else 1)
        parts += [embed(path, f"{kind}, {counted(seen, 'image')} seen", of) for seen, path in shown]
    return element("div", *parts, class_="grids") if parts else None


def show_kind(folder: Path, kind: str, of: str) -> Html | None:
    """Show the newest grid of one kind of `samples/`."""
    grids = kinds(folder).get(kind)
    if not grids:
        return None
    seen, path = grids[-1]
    return element("div", embed(path, f"{kind}, {counted(seen, 'image')} seen", of), class_="grids")


def show_generated(folder: Path, of: str) -> Html | None:
    """Show the newest of what was made with the trained run."""
    paths = sorted((folder / "generated").glob("*.png"), key=lambda path: path.lstat().st_mtime)
    parts = [embed(path, path.name, of) for path in reversed(paths[-_GENERATED:])]
    return element("div", *parts, class_="grids") if parts else None


def embed(path: Path, caption: str, of: str) -> Html:
    """Embed a PNG with a caption, or name a file that is none."""
    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            width, height = image.size
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "it cannot be read" if isinstance(error, OSError) else "it is damaged"
        return element("p", f"{path.parent.name}/{path.name} is left out: {reason}.", class_="note")
    picture = element(
        "img",
        src=f"data:image/png;base64,{base64.b64encode(content).decode()}",
        width=width,
        height=height,
        alt=f"{of}: {caption}",
    )
    return element("figure", picture, element("figcaption", caption), class_="picture")


def last_of_each(runs: list[tuple[str, Path]]) -> Html | None:
    """Show the newest samples of several runs side by side."""
    parts = []
    for name, folder in runs:
        grids = kinds(folder).get("samples")
        if grids:
            seen, path = grids[-1]
            parts.append(embed(path, f"{name}, {counted(seen, 'image')} seen", "samples"))
    return element("div", *parts, class_="grids") if parts else None
