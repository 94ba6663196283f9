"""Sections of a page on the files of `launch/denoise.py` and `launch/explore.py`.

The files are validated: they may be damaged, or written by another program.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dgm.common.formatting import percent
from dgm.common.json_files import read_object
from dgm.report.figures import DENOISING_METRICS, SWEEP_METRICS, SWEEP_TIME
from dgm.report.pictures import Picture, embed
from dgm.report.read_run import Run
from dgm.report.tables import Table, evaluation_tables, listing

_DENOISING = "denoised/denoising.json"
_EXPLORATION = "explored/exploration.json"
_COLUMNS = ["steps", *(f"{m}_{kind}" for m in DENOISING_METRICS for kind in ("noised", "denoised"))]


@dataclass(frozen=True)
class Study:
    """A section of a page."""

    paragraphs: list[str] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    error: str = ""  # why its file is left out


class _FormatError(Exception):
    """A file does not hold what the script writes."""


def denoising_study(run: Run) -> Study | None:
    """Return the section on partly noised and denoised test images; None without any."""
    return _read(run, _DENOISING, "launch/denoise.py", _denoising)


def exploration_study(run: Run) -> Study | None:
    """Return the section on latents and on the sampler's settings; None without any."""
    return _read(run, _EXPLORATION, "launch/explore.py", _exploration)


def denoising_metric(folder: Path, steps: int, name: str) -> float | None:
    """Return a metric of `launch/denoise.py` at a number of steps; None if there is none."""
    try:
        rows = _rows(read_object(folder / _DENOISING) or {}, "steps", "steps", name)
    except _FormatError:
        return None
    return next((float(row[name]) for row in rows if row["steps"] == steps), None)


def denoising_label(name: str) -> str:
    """Return the name of a denoising metric as it is displayed."""
    return name.replace("_", " ").replace("psnr db", "PSNR, dB,").replace("ssim", "SSIM")


def _read(
    run: Run, name: str, script: str, section: Callable[[Run, dict[str, Any]], Study]
) -> Study | None:
    path = run.folder / name
    if not path.exists():
        return None
    found, reason = read_object(path), "it cannot be read as a JSON object"
    try:
        if found is not None:
            return section(run, found)
    except _FormatError as error:
        reason = f"it is not as {script} writes it ({error})"
    return Study(error=f"{name} is left out: {reason}.")


def _denoising(run: Run, found: dict[str, Any]) -> Study:
    rows, curve = _rows(found, "steps", *_COLUMNS), _rows(found, "curve", *_COLUMNS)
    count, total = _number(found, "num_images"), _number(found, "num_timesteps")
    text = (
        f"{count:g} test images, noised by some of the {total:g} steps of the run's schedule "
        f"and denoised from there by {_get(found, 'sampler', 'text')}, after "
        f"{_number(found, 'images_seen'):,} images seen. A classifier recognizes "
        f"the class of {percent(_number(found, 'class_seen_real'))} of the real ones."
    )
    sheets = [
        (
            f"steps-{row['steps']:04g}.png",
            f"{row['steps']:g} steps of noise. Rows: real, noised, denoised, and what was "
            "changed (grey: no change)",
        )
        for row in rows
    ]
    pictures = _sheets(run, "denoised", sheets)
    if curve:
        caption = "Each metric over the number of noising steps"
        pictures.append(embed(run.folder / "denoised" / "curve.png", caption, run.name, True))
    by_steps = {row["steps"]: row for row in [*curve, *rows]}
    table = listing(
        "Similarity to the real images",
        [denoising_label(name) for name in _COLUMNS],
        [[by_steps[steps][name] for name in _COLUMNS] for steps in sorted(by_steps)],
    )
    return Study([text], pictures, [table])


def _exploration(run: Run, found: dict[str, Any]) -> Study:
    sheets = [
        (_get(s, "file", "text"), _get(s, "caption", "text")) for s in _list(found, "sheets", dict)
    ]
    settings = _settings_table(_get(found, "settings", "object"))
    paragraphs = [
        f"After {_number(found, 'images_seen'):,} images seen.",
        *_list(found, "notes", str),
    ]
    tables = [*_latent_tables(found), settings]
    plot = embed(
        run.folder / "explored" / "quality.png",
        "Each metric over the varied setting, beside real test images", run.name, is_plot=True,
    )  # fmt: skip
    return Study(paragraphs, [*_sheets(run, "explored", sheets), plot], tables)


def _latent_tables(found: dict[str, Any]) -> list[Table]:
    path = _get(found, "interpolation", "object")
    names = ("mean_step", "largest_over_mean", "psnr_db_of_ends")
    steps = {n.replace("_", " "): _number(path, n) for n in names if n in path}
    ends = f"{_get(path, 'between', 'text')} along a {_get(path, 'along', 'text')}"
    caption = f"Interpolation between {ends}: steps in the classifier's features"
    tables = evaluation_tables(steps, caption)
    if "traversal" in found:
        traversal = _get(found, "traversal", "object")
        rows = _rows(traversal, "rows")
        columns = list(rows[0]) if rows else []
        _rows(traversal, "rows", *columns)  # all rows have the same numbers
        heads = [column.replace("_", " ") for column in columns]
        caption = f"Traversal: {_get(traversal, 'moved', 'text')}"
        tables.append(listing(caption, heads, [[row[c] for c in columns] for row in rows]))
    return tables


def _settings_table(settings: dict[str, Any]) -> Table:
    varied, real = _list(settings, "varied", str), _get(settings, "real", "object")
    metrics = [name for name in SWEEP_METRICS if name in real]
    columns = [*varied, *metrics, SWEEP_TIME]
    rows = _rows(settings, "rows", *columns)
    if not varied:
        raise _FormatError("nothing was varied")
    cells: list[list[Any]] = [[row[name] for name in columns] for row in rows]
    cells.append([None] * len(varied) + [_number(real, name) for name in metrics] + [None])
    sampler = f" by {settings['sampler']}" if isinstance(settings.get("sampler"), str) else ""
    caption = (
        f"{_number(settings, 'num_images'):g} images{sampler} at each setting; "
        "real test images in the last row"
    )
    return listing(caption, [name.replace("_", " ") for name in columns], cells)


def _sheets(run: Run, folder: str, sheets: list[tuple[str, str]]) -> list[Picture]:
    for name, _ in sheets:
        if Path(name).name != name or not name.endswith(".png"):
            raise _FormatError(f"{name} is not a picture in {folder}")
    return [embed(run.folder / folder / name, caption, run.name) for name, caption in sheets]


_KINDS: dict[str, Any] = {"number": int | float, "text": str, "object": dict, "list": list}


def _get(found: dict[str, Any], name: str, kind: str) -> Any:
    value = found.get(name)
    if isinstance(value, bool) or not isinstance(value, _KINDS[kind]):
        raise _FormatError(f"no {kind} {name}")
    return value


def _number(found: dict[str, Any], name: str) -> float:
    return _get(found, name, "number")


def _list(found: dict[str, Any], name: str, kind: type) -> list[Any]:
    value = _get(found, name, "list")
    if not all(isinstance(item, kind) for item in value):
        raise _FormatError(f"no list {name}")
    return value


def _rows(found: dict[str, Any], name: str, *columns: str) -> list[dict[str, Any]]:
    """Return a list of objects that all have these numbers."""
    rows = _list(found, name, dict)
    for row in rows:
        for column in columns:
            _number(row, column)
    return rows
