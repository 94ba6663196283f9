"""Reading the files of a run folder: config.yaml, metrics.jsonl, checkpoints/."""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dgm.common.config_keys import flatten_nested
from dgm.common.errors import UserError, check_readable
from dgm.common.json_files import as_object, read_objects
from dgm.common.suggestions import nearest
from dgm.common.yaml_io import read_yaml

MANIFEST = "manifest.json"
"""File of a checkpoint with the sizes and checksums of the others, written last."""
_MAX_RUNS = 1000  # runs searched for a similar name


def read_config(path: Path) -> dict[str, Any]:
    """Read a run's config.yaml as dotted keys; raise UserError where it cannot be read."""
    check_readable(path)
    try:
        nested = read_yaml(path)
    except UserError as error:
        raise UserError(f"{error}; or restore it, or move the run") from None
    if not nested:
        raise UserError(f"{path} is empty: restore it or move the run")
    return dict(flatten_nested(nested))


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Read `metrics.jsonl` without its damaged lines, such as one torn by a power cut."""
    return scan_metrics(path)[0]


def scan_metrics(path: Path) -> tuple[list[dict[str, float]], list[int]]:
    """Return the lines of `metrics.jsonl`, sorted by step and unique, and damaged lines' numbers.

    All lines of a run have the same number of images per step; one that differs is damaged too.
    """
    texts = path.read_bytes().split(b"\n") if path.exists() else []
    found = {number: _line(text) for number, text in enumerate(texts, 1) if text.strip()}
    good = {number: line for number, line in found.items() if line is not None}
    batches = Counter(line["images_seen"] / line["step"] for line in good.values())
    lines: dict[float, dict[str, float]] = {}
    damaged = [number for number, line in found.items() if line is None]
    for number, line in good.items():
        if line["images_seen"] / line["step"] != batches.most_common(1)[0][0]:
            damaged.append(number)
        else:
            lines.setdefault(line["step"], line)
    return [lines[step] for step in sorted(lines)], sorted(damaged)


def _line(text: bytes) -> dict[str, float] | None:
    line = as_object(text)
    if line is None or not all(map(_is_number, line.values())):
        return None
    counts = (line.get("step"), line.get("images_seen"))
    return line if all(type(n) is int and n > 0 for n in counts) else None


def _is_number(value: object) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < 2**63)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the JSON objects of a JSONL file; raise UserError if this user may not read it."""
    check_readable(path)
    return read_objects(path)


def newest_saved(folder: Path) -> int | None:
    """Return the images seen by the newest checkpoint; None without one."""
    check_readable(folder / "checkpoints")  # an unreadable folder would look empty
    names = [path.parent.name for path in (folder / "checkpoints").glob(f"*/{MANIFEST}")]
    return max((int(name) for name in names if name.isdecimal()), default=None)


def hint_at_runs(folder: Path) -> str:
    """Suggest the run folder that was meant: one around `folder`, in it, or under runs/."""
    around = next((p for p in folder.parents if (p / "config.yaml").is_file()), None)
    if around is not None:
        return f"did you mean {around}?"
    inside = sorted(_runs_under(folder))
    if inside:
        return f"it holds runs, name one: {', '.join(map(str, inside[:5]))}"
    for root in (folder.parent, Path("runs")):
        # Relative, because long paths with a common beginning are similar.
        name = folder.relative_to(root) if folder.is_relative_to(root) else Path(folder.name)
        names = {run.name: run for run in _runs_under(root)}
        names |= {str(run.relative_to(root)): run for run in _runs_under(root)}
        if near := nearest(str(name), names, cutoff=0.6):
            return f"did you mean {names[near]}?"
    if next(_runs_under(Path("runs")), None) is None:
        return "runs/ holds no run: train one first, or give the path of one"
    return "name one of runs/"


def _runs_under(root: Path) -> Iterator[Path]:
    """Yield the run folders in a folder, and those of sweeps in it."""
    with contextlib.suppress(OSError):
        for pattern in ("*/config.yaml", "*/*/config.yaml"):
            yield from (path.parent for path in itertools.islice(root.glob(pattern), _MAX_RUNS))
