"""Write a page on runs: `python launch/report.py runs/small-ddpm-shapes`.

One self-contained HTML file: curves, samples, metrics, cost, and how to run it again. Several runs,
or the folder of a sweep, are shown side by side.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from jsonargparse import ArgumentParser

from dgm.cli.parser import family_module, family_of, make_options_parser, parse_options, path_word
from dgm.cli.path_checks import check_file
from dgm.common.atomic_io import write_whole
from dgm.common.config_keys import flatten
from dgm.common.errors import UserError
from dgm.common.run_files import hint_at_runs
from dgm.report.read_run import Failure, Run, find_failure, read_run, sweep_folders


def make_parser() -> ArgumentParser:
    """Return the parser of the command line."""
    parser = make_options_parser(__doc__)
    parser.add_argument(
        "runs", nargs="+", type=path_word, metavar="RUN", help="folders of runs or sweeps"
    )
    parser.add_argument(
        "--out", type=path_word, help="file of the page; default RUN/report.html for a single run"
    )
    return parser


def open_run(folder: Path, name: str) -> Run:
    """Read a run folder with the defaults of its family; raise UserError if it is damaged."""
    family = family_of(folder / "config.yaml")
    return read_run(folder, name, family, flatten(family_module(family).Config()))


def choose_out(out: str | None, folders: list[Path]) -> Path:
    """Return the file of the page; raise UserError if it cannot be written."""
    if out is None and len(folders) > 1:
        raise UserError(
            f"{len(folders)} folders are given, but not --out: name the page, as --out report.html"
        )
    path = folders[0] / "report.html" if out is None else Path(out)
    check_file("--out", path, out or "")
    return path


def short_names(folders: list[Path]) -> list[str]:
    """Return the name of each folder; if two are equal, its path below their common parent."""
    resolved = [folder.resolve() for folder in folders]
    names = [path.name for path in resolved]
    if len(set(names)) == len(names):
        return names
    common = os.path.commonpath(resolved)
    return [str(path.relative_to(common)) for path in resolved]


def find_runs(folders: list[Path]) -> dict[Path, bool]:
    """Return the run folders in `folders`, each once, with whether it was found in a sweep.

    Raise UserError naming a folder that is neither a run nor a sweep.
    """
    found: dict[Path, bool] = {}
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder: {hint_at_runs(folder)}")
        if (folder / "config.yaml").is_file():
            found[folder] = False
            continue
        inside = sweep_folders(folder)
        if not inside:
            raise UserError(
                f"{folder} is neither a run folder (no config.yaml) nor that of a sweep "
                f"(no run folder in it): {hint_at_runs(folder)}"
            )
        found.update({path: True for path in inside})
    return {path: found[path] for path in {p.resolve(): p for p in found}.values()}


def read_all(folders: list[Path]) -> tuple[list[Run], list[Failure]]:
    """Read runs, and failures of sweeps; a damaged run does not hide the others of its sweep."""
    found = find_runs(folders)
    runs, failures = [], []
    for (folder, in_sweep), name in zip(found.items(), short_names(list(found)), strict=True):
        if in_sweep and (failure := find_failure(folder, name)) is not None:
            failures.append(failure)
        if not (folder / "config.yaml").is_file():
            continue
        try:
            runs.append(open_run(folder, name))
        except UserError as error:
            if not in_sweep:
                raise
            failures.append(Failure(name, "cannot be read", str(error)))
    return runs, failures


def main() -> None:
    """Write the page of the runs on the command line."""
    options = parse_options(make_parser(), sys.argv[1:])
    folders = [Path(name) for name in dict.fromkeys(options.runs)]
    runs, failures = read_all(folders)
    out = choose_out(options.out, folders)
    from dgm.report.page import make_page  # here, to keep --help fast

    title = folders[0].resolve().name if len(folders) == 1 else f"{len(runs)} runs"
    page = make_page(title, runs, failures)
    try:
        write_whole(out, page)
    except OSError as error:
        raise UserError(
            f"{out} cannot be written ({error.strerror}): choose another --out"
        ) from None
    print(f"{len(runs)} run{'s' * (len(runs) != 1)}: {out}")
