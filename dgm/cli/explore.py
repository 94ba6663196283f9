"""Traverse a run's latents and sweep its sampler's settings: `python launch/explore.py RUN`.

Interpolation between test images through their latents (of a GAN: between latents); traversal of
single latents or of directions that change images most (of a VAE, flow or GAN); and the same draws
at several settings of the sampler, with quality, diversity and time: guidance and steps of a
diffusion model, the temperature of a flow, VAE or GAN. Sheets, metrics and a
plot in RUN/explored.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from jsonargparse import ArgumentParser, Namespace
from torch import Tensor

from dgm import images
from dgm.cli.eval_context import EvalContext, add_study_options
from dgm.cli.latent_explorer import Explorer
from dgm.cli.load_run import TrainedRun, load_run, open_train_data, parse_checkpoint
from dgm.cli.parser import make_options_parser, parse_options, read_list
from dgm.cli.path_checks import check_folder
from dgm.cli.start_engine import start_engine
from dgm.common.atomic_io import write_whole
from dgm.common.errors import UserError
from dgm.common.progress import progress
from dgm.common.validation import check_range
from dgm.diffusion.objective import DiffusionObjective
from dgm.diffusion.samplers import SamplerName
from dgm.evaluation.online_eval import MAX_SAMPLES
from dgm.preprocessing import STANDARD
from dgm.report.figures import save_sweep_plots
from dgm.training.engine import Engine

VARIED = {
    "diffusion": ("guidance", "steps"),
    "gan": ("temperature",),
    "vae": ("temperature",),
    "flow": ("temperature",),
}
VALUES = {
    "guidance": "1,2,4",
    "steps": "5,10,20",
    "temperature": "0.5,0.7,1",
}


def make_parser() -> ArgumentParser:
    """Return the parser of the command line."""
    parser = make_options_parser(__doc__)
    add_study_options(parser, "run folder", "explored")
    for name, values in VALUES.items():
        families = " or ".join(family for family, names in VARIED.items() if name in names)
        parser.add_argument(f"--{name}", help=f"values to try of a {families}; default {values}")
    names = get_args(SamplerName)
    parser.add_argument("--sampler", choices=names, help="default: the run's sample.sampler")
    parser.add_argument(
        "--path", choices=["sphere", "line"],
        help="of the interpolation; default sphere, of a flow line",
    )  # fmt: skip
    parser.add_argument("--num_images", type=int, default=200, help="at each setting")
    parser.add_argument("--num_pairs", type=int, default=8, help="rows of the interpolation")
    return parser


def choose_settings(
    options: Namespace, trained: TrainedRun
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the settings to sweep and notes on what is left out.

    Raise UserError for an option of another family or a bad value.
    """
    own, notes = list(VARIED[trained.family]), []
    known = own + ["sampler"] * (trained.family == "diffusion")
    for name in (*VALUES, "sampler"):
        if options[name] is not None and name not in known:
            raise UserError(
                f"--{name} {options[name]} means nothing to a {trained.family} run: "
                f"it has {', '.join(known)}"
            )
    objective = trained.objective
    if isinstance(objective, DiffusionObjective):
        if objective.num_classes is None or objective.config.label_drop == 0:
            own.remove("guidance")
            lacks = "classes" if objective.num_classes is None else "withholding classes"
            notes.append(f"Guidance is left out: the run was trained without {lacks}.")
        if options.steps is None:  # a schedule may be shorter than the default values
            total = objective.schedule.num_timesteps
            few = [n for n in VALUES["steps"].split(",") if int(n) <= total]
            options.steps = ",".join(few or [str(total)])
    values = {name: _values(name, options[name] or VALUES[name], trained) for name in own}
    return [dict(zip(values, v, strict=True)) for v in itertools.product(*values.values())], notes


def _values(name: str, text: str, trained: TrainedRun) -> Sequence[float]:
    values = read_list(f"--{name}", text, int if name == "steps" else float)
    minimum = {"steps": 1, "guidance": 0}.get(name)
    for value in values:
        if not (value > 0 if minimum is None else value >= minimum) or value == float("inf"):
            bound = "a number above 0" if minimum is None else f"{minimum} or more"
            raise UserError(f"--{name} names {value}: choose {bound}")
    if name == "steps" and isinstance(trained.objective, DiffusionObjective):
        total = trained.objective.schedule.num_timesteps
        if max(values) > total:
            raise UserError(
                f"--steps names {max(values)}: choose 1 to {total}, the run's "
                "diffusion.num_timesteps"
            )
    return values


def explore(options: Namespace, engine: Engine) -> dict[str, Any]:
    """Explore a run; the main process writes the sheets."""
    check_range(options, "--", "num_shown", "num_pairs", "epochs", min=1, max=MAX_SAMPLES)
    check_range(options, "--", "num_images", min=2, max=MAX_SAMPLES)
    folder, out = Path(options.run), output_folder(options)
    trained = load_run(folder, parse_checkpoint(options.checkpoint))
    check_folder("--out", out)
    settings, notes = choose_settings(options, trained)
    explorer = Explorer(EvalContext(options, engine, trained, *open_train_data(folder, trained)))
    found: dict[str, Any] = {
        "family": trained.family,
        "images_seen": trained.images_seen,
        "seed": options.seed,
        "num_processes": engine.world_size,
        "notes": notes,
        "sheets": [],
    }

    def save_sheet(name: str, caption: str, sheet: Tensor) -> None:
        found["sheets"].append({"file": f"{name}.png", "caption": caption})
        if engine.is_main:
            pixels = images.to_uint8(sheet.flatten(0, 1), STANDARD)
            images.save_png(out / f"{name}.png", images.grid(pixels, sheet.shape[1]))

    with progress("interpolation"):
        found["interpolation"], sheet = explorer.interpolate()
    between, path = (found["interpolation"][name] for name in ("between", "along"))
    ends = "; the real images at both sides" if between == "test images" else ""
    save_sheet("interpolation", f"Interpolation between {between} along a {path}{ends}.", sheet)
    with progress("traversal"):
        traversal = explorer.traverse()
    if traversal is not None:
        found["traversal"], sheet = traversal
        moved, reach = found["traversal"]["moved"], f"{found['traversal']['reach']:g}"
        caption = f"Traversal: {moved}, from -{reach} to {reach}, a row for each."
        save_sheet("traversal", caption, sheet)
    with progress("sampler settings"):
        found["settings"], sheet = explorer.sweep(settings)
    for name, caption, rows in sheets_of(settings):
        save_sheet(name, caption, sheet[rows])
    return found


def sheets_of(settings: list[dict[str, Any]]) -> list[tuple[str, str, list[int]]]:
    """Return name, caption and rows of each sheet: a row for each value of the last setting."""
    *outer, inner = settings[0]
    groups: dict[str, list[int]] = {}
    for k, setting in enumerate(settings):
        groups.setdefault("-".join(f"{n}-{setting[n]:g}" for n in outer) or inner, []).append(k)
    sheets = []
    for name, rows in groups.items():
        fixed = "".join(f"{n.capitalize()} {settings[rows[0]][n]:g}: t" for n in outer) or "T"
        values = ", ".join(f"{settings[k][inner]:g}" for k in rows)
        sheets.append((name, f"{fixed}he same draws, rows by {inner}: {values}.", rows))
    return sheets


def output_folder(options: Namespace) -> Path:
    """Return the folder for sheets and metrics."""
    return Path(options.out or Path(options.run) / "explored")


def print_tables(found: dict[str, Any]) -> None:
    """Print interpolation and traversal, then a row for each setting and for the real images."""
    for note in found["notes"]:
        print(note)
    interpolation = found["interpolation"]
    of_ends = interpolation.get("psnr_db_of_ends")
    psnr = "" if of_ends is None else f", PSNR of the ends {of_ends:.2f} dB"
    print(
        f"interpolation between {interpolation['between']} along a {interpolation['along']}: step "
        f"{interpolation['mean_step']:.4f}, largest over mean "
        f"{interpolation['largest_over_mean']:.2f}{psnr}"
    )
    if "traversal" in found:
        print(f"traversal: {found['traversal']['moved']}")
        for row in found["traversal"]["rows"]:
            cells = (f"{name} {value:.4g}" for name, value in row.items())
            print(f"  {', '.join(cells).replace('_', ' ')}")
    settings = found["settings"]
    varied = settings["varied"]
    heads = [*varied, *settings["real"], "seconds_per_image"]
    widths = [max(len(head), 8) for head in heads]
    print("  ".join(f"{head:>{width}}" for head, width in zip(heads, widths, strict=True)))
    for row in [*settings["rows"], {varied[0]: "real", **settings["real"]}]:
        cells = (
            f"{value:.4g}" if isinstance(value := row.get(head, ""), int | float) else value
            for head in heads
        )
        print("  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)))


def main() -> None:
    """Explore from the command line: tables on screen; sheets, a plot and JSON in a folder."""
    options = parse_options(make_parser(), sys.argv[1:])
    with contextlib.closing(start_engine("no")) as engine:
        found = explore(options, engine)
        if engine.is_main:
            out = output_folder(options)
            write_whole(out / "exploration.json", json.dumps(found, indent=1) + "\n")
            print_tables(found)
            save_sweep_plots(found["settings"], out / "quality.png")
            print(f"sheets, metrics and plot: {out}")
