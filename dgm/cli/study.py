"""Options of `denoise`, `explore` and `sample`, their checks, and sheets (image grids)."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace
from torch import Tensor

from dgm import images
from dgm.cli.parser import path_word, read_list
from dgm.common.errors import UserError
from dgm.diffusion.objective import DiffusionObjective
from dgm.preprocessing import PixelMap


def add_study_options(parser: ArgumentParser, runs: str, folder: str) -> None:
    """Add the shared options; `folder` is the default of --out."""
    add = parser.add_argument
    add("run", type=path_word, help=runs)
    add("--num_shown", type=int, default=10, help="images shown on a sheet")
    add("--checkpoint", help="by images seen, or best; default the newest")
    add("--out", type=path_word, help=f"folder to write to; default RUN/{folder}")
    add("--epochs", type=int, help="epochs of the classifier; default: until 20,000 images seen")
    add("--seed", type=int, default=1, help="seed of classifier, images and noise")
    add("--test_shards", type=path_word, help="test shards; default: from the run's source")


def read_steps(text: str, objective: DiffusionObjective) -> list[int]:
    """Return the numbers of --steps; raise UserError if the schedule is shorter."""
    steps, total = read_list("--steps", text, int), objective.schedule.num_timesteps
    for step in steps:
        if not 1 <= step <= total:
            raise UserError(
                f"--steps names {step}: choose 1 to {total}, the run's diffusion.num_timesteps"
            )
    return steps


def refuse_options_of_other_families(
    options: Namespace, names: Iterable[str], own: Collection[str], family: str
) -> None:
    """Raise UserError if an option of `names` is given that is not among the family's, `own`."""
    for name in names:
        if options[name] is not None and name not in own:
            raise UserError(
                f"--{name} {options[name]} is not an option of a {family} run: choose from "
                f"{', '.join(own)}"
            )


def save_sheet(path: Path, sheet: Tensor, pixels: PixelMap) -> None:
    """Write images [rows, columns, C, H, W] as a PNG grid."""
    rows = images.to_uint8(sheet.flatten(0, 1), pixels)
    images.save_png(path, images.grid(rows, sheet.shape[1]))
