"""What studies of a run left in its folder, read with care: anyone may have written there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dgm.report.markup import Html, element
from dgm.report.pictures import embed
from dgm.report.read_run import as_object


class ForeignError(Exception):
    """A file does not hold what the study writes."""


def show_study(
    folder: Path, name: str, script: str, show: Callable[[dict[str, Any]], Html]
) -> Html | None:
    """Show the study of which `name` in a run folder tells, or name a file that cannot be shown.

    None where there is none.
    """
    path = folder / name
    if not path.exists():
        return None
    try:
        found = as_object(path.read_text(errors="replace", encoding="utf-8"))
        if found is not None:
            return show(found)
        reason = "it cannot be read as a JSON object"
    except OSError:
        reason = "it cannot be read"
    except ForeignError as error:
        reason = f"it is not as {script} writes it ({error})"
    return element("p", f"{name} is left out: {reason}.", class_="note")


def number_in(found: dict[str, Any], name: str) -> float:
    """Give a number, which need not be finite; raises ForeignError where there is none."""
    value = found.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ForeignError(f"no number {name}")
    return value


def text_in(found: dict[str, Any], name: str) -> str:
    """Give a text; raises ForeignError where there is none."""
    value = found.get(name)
    if not isinstance(value, str):
        raise ForeignError(f"no text {name}")
    return value


def object_in(found: dict[str, Any], name: str) -> dict[str, Any]:
    """Give an object; raises ForeignError where there is none."""
    value = found.get(name)
    if not isinstance(value, dict):
        raise ForeignError(f"no object {name}")
    return value


def list_in(found: dict[str, Any], name: str, kind: type) -> list[Any]:
    """Give a list of values of one kind; raises ForeignError where there is none."""
    value = found.get(name)
    if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
        raise ForeignError(f"no list {name}")
    return value


def rows_in(found: dict[str, Any], name: str, *columns: str) -> list[dict[str, Any]]:
    """Give a list of objects that have these numbers; raises ForeignError where there is none."""
    rows = list_in(found, name, dict)
    for row in rows:
        for column in columns:
            number_in(row, column)
    return rows


def show_sheets(folder: Path, sheets: list[tuple[str, str]], of: str) -> Html | None:
    """Embed pictures of a folder by file name, each with a caption; None without any.

    Raises ForeignError where a name leads elsewhere.
    """
    for name, _ in sheets:
        if Path(name).name != name or not name.endswith(".png"):
            raise ForeignError(f"{name} is no picture in {folder.name}")
    parts = [embed(folder / name, caption, of) for name, caption in sheets]
    return element("div", *parts, class_="grids") if parts else None
