"""Write a page on runs: `python launch/report.py runs/small-ddpm-shapes`.

One HTML file that needs nothing beside it: curves, samples, measures, cost, and how to run it
again. Several runs, or the folder of a sweep, are shown side by side.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from jsonargparse import ArgumentParser

from dgm.cli.families import FAMILIES, family_of
from dgm.cli.load_run import suggest_run
from dgm.cli.parser import make_options_parser, parse_options, path_word
from dgm.cli.path_checks import check_file
from dgm.common.atomic_io import write_whole
from dgm.common.config_keys import flatten
from dgm.common.errors import UserError
from dgm.common.run_files import read_config
from dgm.report.failures import Failure, children, find_failure
from dgm.report.page import make_page
from dgm.report.read_run import Run, read_run


def make_parser() -> ArgumentParser:
    """Describe the command line."""
    parser = make_options_parser(__doc__)
    parser.add_argument(
        "runs", nargs="+", type=path_word, metavar="RUN", help="run folders, or those of sweeps"
    )
    parser.add_argument(
        "--out", type=path_word, help="the page; default RUN/report.html where one is given"
    )
    return parser


def open_run(folder: Path, name: str) -> Run:
    """Read a run folder with the defaults of its family; raises UserError where it is damaged."""
    path = folder / "config.yaml"
    read_config(path)  # which says more of what cannot be read
    family = family_of(path)
    defaults = {key: value for key, value, _ in flatten(FAMILIES[family].Config())}
    return read_run(folder, name, family, defaults)


def choose_out(wanted: str | None, folders: list[Path]) -> Path:
    """Say where the page goes; raises UserError where it cannot."""
    if wanted is None and len(folders) > 1:
        raise UserError(
            f"{len(folders)} folders are given, but not --out: name the page, as --out report.html"
        )
    out = folders[0] / "report.html" if wanted is None else Path(wanted)
    check_file("--out", out, wanted or "")
    return out


def names_of(folders: list[Path]) -> list[str]:
    """Name folders by their last part, or by all that they do not share."""
    whole = [folder.resolve() for folder in folders]
    names = [path.name for path in whole]
    if len(set(names)) == len(names):
        return names
    shared = os.path.commonpath(whole)
    return [str(path.relative_to(shared)) for path in whole]


def find_runs(folders: list[Path]) -> dict[Path, bool]:
    """Find the run folders that are meant, and whether each is one of a sweep.

    Raises UserError naming a folder that is neither a run nor a sweep.
    """
    found: dict[Path, bool] = {}
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder} is no folder: {suggest_run(folder)}")
        if (folder / "config.yaml").is_file():
            found[folder] = False
            continue
        inside = children(folder)
        if not inside:
            raise UserError(
                f"{folder} is neither a run folder (no config.yaml) nor that of a sweep "
                f"(no run folder in it): {suggest_run(folder)}"
            )
        found.update({path: True for path in inside})
    # A run that is named twice, or beside its sweep, is one.
    return {path: found[path] for path in {p.resolve(): p for p in found}.values()}


def collect(folders: list[Path]) -> tuple[list[Run], list[Failure]]:
    """Read runs, and what failed of sweeps; a damaged run does not hide the others of its sweep."""
    found = find_runs(folders)
    runs, failures = [], []
    for (folder, in_sweep), name in zip(found.items(), names_of(list(found)), strict=True):
        failure = find_failure(folder, name) if in_sweep else None
        failures += [] if failure is None else [failure]
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
    """Write the page by the command line."""
    options = parse_options(make_parser(), sys.argv[1:])
    folders = [Path(name) for name in dict.fromkeys(options.runs)]
    runs, failures = collect(folders)
    out = choose_out(options.out, folders)
    single = folders[0].resolve().name
    page = make_page(single if len(folders) == 1 else f"{len(runs)} runs", runs, failures)
    try:
        write_whole(out, page)
    except OSError as error:
        raise UserError(
            f"{out} cannot be written ({error.strerror}): choose another --out"
        ) from None
    print(f"{len(runs)} run{'s' * (len(runs) != 1)}: {out}")
