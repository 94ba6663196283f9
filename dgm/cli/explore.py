"""Walk through what a run has learned, and try its settings: `python launch/explore.py RUN`.

From image to image through their latents (of a GAN: from latent to latent); along single latents or
directions that change images most (of a VAE, flow or GAN); and the same draws at several settings
of the sampler, with quality, diversity and time: guidance and steps of a diffusion model, the
temperature of a flow or VAE, the truncation of a GAN. Sheets, figures and a plot in RUN/explored.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from jsonargparse import ArgumentParser, Namespace
from torch import Tensor

from dgm import images
from dgm.cli.eval_context import Subject
from dgm.cli.latent_explorer import Explorer
from dgm.cli.load_run import Trained, open_data, open_trained
from dgm.cli.parser import make_options_parser, parse_options, path_word, read_list
from dgm.cli.path_checks import check_folder
from dgm.cli.sample import choose_checkpoint
from dgm.cli.start_engine import start_engine
from dgm.common.atomic_io import write_whole
from dgm.common.errors import UserError
from dgm.common.progress import progress
from dgm.common.validation import check_range
from dgm.diffusion.objective import DiffusionObjective
from dgm.diffusion.samplers import SamplerName
from dgm.evaluation.online_eval import MOST_MADE
from dgm.preprocessing import STANDARD
from dgm.report.exploring import save_plots
from dgm.training.engine import Engine

VARIED = {
    "diffusion": ("guidance", "steps"),
    "gan": ("truncation",),
    "vae": ("temperature",),
    "flow": ("temperature",),
}
VALUES = {
    "guidance": "1,2,4",
    "steps": "5,10,20",
    "temperature": "0.5,0.7,1",
    "truncation": "0.5,0.7,1",
}


def make_parser() -> ArgumentParser:
    """Describe the command line."""
    parser = make_options_parser(__doc__)
    parser.add_argument("run", type=path_word, help="run folder")
    for name, values in VALUES.items():
        families = " or ".join(family for family, names in VARIED.items() if name in names)
        parser.add_argument(f"--{name}", help=f"values to try of a {families}; default {values}")
    names = get_args(SamplerName)
    parser.add_argument("--sampler", choices=names, help="default: the run's sample.sampler")
    parser.add_argument(
        "--path", choices=["sphere", "line"], help="from latent to latent; default sphere, of a "
        "flow line",
    )  # fmt: skip
    parser.add_argument("--num_images", type=int, default=200, help="at each setting")
    parser.add_argument("--num_shown", type=int, default=10, help="of them on the sheets")
    parser.add_argument("--num_pairs", type=int, default=8, help="rows of the interpolation")
    parser.add_argument("--checkpoint", help="its images seen, or best; default the newest")
    parser.add_argument("--out", type=path_word, help="folder to write to; default RUN/explored")
    parser.add_argument("--epochs", type=int, help="of the classifier; default until 20,000 images")
    parser.add_argument("--seed", type=int, default=1, help="of classifier, images and draws")
    parser.add_argument(
        "--test_shards", type=path_word, help="real images; default as the run's source"
    )
    return parser


def choose_settings(options: Namespace, trained: Trained) -> tuple[list[dict[str, Any]], list[str]]:
    """Choose the settings to try, and say what was left out; raises UserError for a bad value."""
    own, notes = list(VARIED[trained.family]), []
    for name in (*VALUES, "sampler"):
        known = own + ["sampler"] * (trained.family == "diffusion")
        if options[name] is not None and name not in known:
            raise UserError(
                f"--{name} {options[name]} means nothing to a {trained.family} run: "
                f"it has {', '.join(known)}"
            )
    objective = trained.objective
    if isinstance(objective, DiffusionObjective):
        if objective.num_classes is None or objective.config.label_drop == 0:
            own.remove("guidance")
            why = "classes" if objective.num_classes is None else "withholding classes"
            notes.append(f"Guidance is left out: the run was trained without {why}.")
        if options.steps is None:  # a schedule may be shorter than the values by default
            total = objective.schedule.num_timesteps
            few = [n for n in VALUES["steps"].split(",") if int(n) <= total]
            options.steps = ",".join(few or [str(total)])
    tried = {name: _values(name, options[name] or VALUES[name], trained) for name in own}
    return [dict(zip(tried, v, strict=True)) for v in itertools.product(*tried.values())], notes


def _values(name: str, text: str, trained: Trained) -> Sequence[float]:
    values = read_list(f"--{name}", text, int if name == "steps" else float)
    least = {"steps": 1, "guidance": 0}.get(name)
    for value in values:
        if not (value > 0 if least is None else value >= least) or value == float("inf"):
            bound = "a number above 0" if least is None else f"{least} or more"
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
    """Explore a run; the first process writes the sheets."""
    check_range(options, "--", "num_shown", "num_pairs", "epochs", least=1, most=MOST_MADE)
    check_range(options, "--", "num_images", least=2, most=MOST_MADE)
    trained = open_trained(Path(options.run), choose_checkpoint(options.checkpoint))
    check_folder("--out", folder_of(options))
    settings, notes = choose_settings(options, trained)
    explorer = Explorer(Subject(options, engine, trained, *open_data(Path(options.run), trained)))
    found: dict[str, Any] = {
        "family": trained.family,
        "images_seen": trained.images_seen,
        "seed": options.seed,
        "num_processes": engine.world_size,
        "notes": notes,
        "sheets": [],
    }

    def show(name: str, caption: str, sheet: Tensor) -> None:
        found["sheets"].append({"file": f"{name}.png", "caption": caption})
        if engine.is_main:
            pixels = images.to_uint8(sheet.flatten(0, 1), STANDARD)
            images.save_png(folder_of(options) / f"{name}.png", images.grid(pixels, sheet.shape[1]))

    with progress("interpolation"):
        found["interpolation"], sheet = explorer.interpolate()
    between, along = (found["interpolation"][name] for name in ("between", "along"))
    ends = "; the real images at both sides" if between == "test images" else ""
    show("interpolation", f"Interpolation between {between} along a {along}{ends}.", sheet)
    with progress("traversal"):
        walked = explorer.traverse()
    if walked is not None:
        found["traversal"], sheet = walked
        moved, reach = found["traversal"]["moved"], f"{found['traversal']['reach']:g}"
        show("traversal", f"Traversal: {moved}, from -{reach} to {reach}, a row for each.", sheet)
    with progress("trying settings"):
        found["settings"], sheet = explorer.try_settings(settings)
    for name, caption, rows in sheets_of(settings):
        show(name, caption, sheet[rows])
    return found


def sheets_of(settings: list[dict[str, Any]]) -> list[tuple[str, str, list[int]]]:
    """Share settings among sheets, a row for each value of the last name: name, caption, rows."""
    *outer, inner = settings[0]
    groups: dict[str, list[int]] = {}
    for k, setting in enumerate(settings):
        groups.setdefault("-".join(f"{n}-{setting[n]:g}" for n in outer) or inner, []).append(k)
    found = []
    for name, rows in groups.items():
        held = "".join(f"{n.capitalize()} {settings[rows[0]][n]:g}: t" for n in outer) or "T"
        values = ", ".join(f"{settings[k][inner]:g}" for k in rows)
        found.append((name, f"{held}he same draws, rows by {inner}: {values}.", rows))
    return found


def folder_of(options: Namespace) -> Path:
    """Say where sheets and figures go."""
    return Path(options.out or Path(options.run) / "explored")


def show_figures(found: dict[str, Any]) -> None:
    """Print tables: the walks, then a row for each setting and one for the real images."""
    for note in found["notes"]:
        print(note)
    walk = found["interpolation"]
    near = (
        f", PSNR of the ends {walk['psnr_db_of_ends']:.2f} dB" if "psnr_db_of_ends" in walk else ""
    )
    print(
        f"interpolation between {walk['between']} along a {walk['along']}: "
        f"step {walk['mean_step']:.4f}, largest over mean {walk['largest_over_mean']:.2f}{near}"
    )
    if "traversal" in found:
        print(f"traversal: {found['traversal']['moved']}")
        for row in found["traversal"]["rows"]:
            said = (f"{name} {value:.4g}" for name, value in row.items())
            print(f"  {', '.join(said).replace('_', ' ')}")
    settings = found["settings"]
    measures = list(settings["real"])
    varied = settings["varied"]
    heads = [*varied, *measures, "seconds_per_image"]
    widths = [max(len(head), 8) for head in heads]
    print("  ".join(f"{head:>{width}}" for head, width in zip(heads, widths, strict=True)))
    for row in [*settings["rows"], {varied[0]: "real", **settings["real"]}]:
        cells = (
            f"{value:.4g}" if isinstance(value := row.get(head, ""), int | float) else value
            for head in heads
        )
        print("  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)))


def main() -> None:
    """Explore by the command line: tables on screen; sheets, a plot and JSON in a folder."""
    options = parse_options(make_parser(), sys.argv[1:])
    engine = start_engine("no")
    try:
        found = explore(options, engine)
        if engine.is_main:
            out = folder_of(options)
            write_whole(out / "exploration.json", json.dumps(found, indent=1) + "\n")
            show_figures(found)
            save_plots(found["settings"], out / "quality.png")
            print(f"sheets, figures and plot: {out}")
    finally:
        engine.close()
