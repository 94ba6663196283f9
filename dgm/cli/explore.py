"""Traverse a run's latents and sweep its sampler's settings: `python launch/explore.py RUN`.

Interpolation between test images through their latents (of a GAN: between latents); traversal of
single latents or of directions that change images most (of a VAE, flow or GAN); and the same draws
at several settings of the sampler, with quality, diversity and time: guidance and steps of a
diffusion model, the temperature of a flow, VAE or GAN. Sheets, metrics and a plot in RUN/explored.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, cast, get_args

import numpy as np
import torch
from jsonargparse import ArgumentParser, Namespace
from torch import Tensor
from torch.nn import functional

from dgm.cli.eval_context import EvalContext
from dgm.cli.load_run import TrainedRun, load_run_on_all, open_train_data
from dgm.cli.parser import make_options_parser, parse_options, read_list
from dgm.cli.path_checks import check_folder
from dgm.cli.study import (
    add_study_options,
    read_steps,
    refuse_options_of_other_families,
    save_sheet,
)
from dgm.common.atomic_io import write_whole
from dgm.common.errors import UserError
from dgm.common.progress import progress
from dgm.common.validation import check_range
from dgm.diffusion.objective import DiffusionObjective
from dgm.diffusion.samplers import SamplerName
from dgm.evaluation import latent_traversal
from dgm.evaluation.class_labels import (
    balanced_subset,
    is_balanced,
    labels_by_frequency,
    uniform_labels,
)
from dgm.evaluation.classifier import to_input
from dgm.evaluation.image_similarity import feature_distance, psnr
from dgm.evaluation.likelihood import load_batch
from dgm.evaluation.online_eval import MAX_SAMPLES
from dgm.evaluation.sampler_sweep import SampleQuality, sweep_sampler
from dgm.latent_space import lerp_path, slerp_path, traverse_directions
from dgm.objective import LatentDecoder, LatentEncoder, Objective
from dgm.preprocessing import STANDARD
from dgm.report.figures import save_sweep_plots
from dgm.rng import Draws, permutation
from dgm.training.engine import Engine
from dgm.training.process_settings import start_engine
from dgm.vae.objective import VAEObjective

VALUES = {"guidance": "1,2,4", "steps": "5,10,20", "temperature": "0.5,0.7,1"}
"""Fields of a family's `sample.*` that are varied, with the values to try by default."""
NUM_COLUMNS = 11  # images in a row of an interpolation or traversal
REACH = 3.0  # standard deviations of the prior, in both directions
NUM_DIRECTIONS = 8
NUM_POINTS = 4  # latents at which directions are determined
Explored = tuple[dict[str, Any], Tensor]  # metrics, and a sheet [rows, columns, C, H, W]


def make_parser() -> ArgumentParser:
    """Return the parser of the command line."""
    parser = make_options_parser(__doc__)
    add_study_options(parser, "run folder", "explored")
    for name, values in VALUES.items():
        parser.add_argument(f"--{name}", help=f"values of sample.{name} to try; default {values}")
    names = get_args(SamplerName)
    parser.add_argument("--sampler", choices=names, help="default: the run's sample.sampler")
    parser.add_argument(
        "--path", choices=["sphere", "line"],
        help="path of the interpolation; default: line for a flow, else sphere",
    )  # fmt: skip
    parser.add_argument("--num_images", type=int, default=200, help="images per setting")
    parser.add_argument("--num_pairs", type=int, default=8, help="rows of the interpolation")
    return parser


class Explorer:
    """Interpolates and traverses a run's latents, and sweeps its sampler's settings."""

    def __init__(self, context: EvalContext):
        """Choose test images: balanced by class, in pairs of a class if class-conditional."""
        self.context, self.engine = context, context.engine
        self.objective = cast(LatentDecoder, context.trained.objective)
        self.encodes = isinstance(self.objective, LatentEncoder)
        options = context.options
        labels = context.test.labels(np.arange(len(context.test)))
        run = 2 if context.class_conditional else 1
        rows = balanced_subset(labels, 2 * options.num_pairs, options.seed, run)
        self.ends = torch.from_numpy(rows)
        if len(self.ends) < 2:
            raise UserError(
                f"{options.test_shards or 'the test images'} hold {len(labels)} images, too few "
                "to interpolate between: choose others with --test_shards"
            )

    def interpolate(self) -> Explored:
        """Interpolate between test images, or between latents if there is no encoder."""
        context = self.context
        z, labels = self._start(len(self.ends) // 2 * 2)
        # A flow's latents encode all of an image, and the arc between two of them leaves the data;
        # Kingma and Dhariwal 2018 (section 6) interpolate linearly.
        path = context.options.path or ("line" if context.trained.family == "flow" else "sphere")
        interpolate = {"line": lerp_path, "sphere": slerp_path}[path]
        sheet = self._decode(interpolate(z[0::2], z[1::2], NUM_COLUMNS), labels[0::2])
        rows: list[dict[str, Any]] = [*latent_traversal.smoothness(context.classifier, sheet)]
        between = "test images" if self.encodes else "latents"
        metrics: dict[str, Any] = {"between": between, "along": path}
        for name in ("mean_step", "largest_over_mean"):
            metrics[name] = fmean(row[name] for row in rows)
        if self.encodes or context.class_conditional:
            names = [context.trained.classes[int(label)] for label in labels]
            ends = zip(names[0::2], names[1::2], strict=True)
            rows = [{"from": a, "to": b, **row} for (a, b), row in zip(ends, rows, strict=True)]
        metrics["rows"] = rows
        if self.encodes:
            real = to_input(context.test.images(self.ends[: len(z)].numpy()), self.engine.device)
            decoded = torch.stack([sheet[:, 0], sheet[:, -1]], dim=1).flatten(0, 1)
            metrics["psnr_db_of_ends"] = float(
                psnr(STANDARD.to_levels(decoded), STANDARD.to_levels(real)).mean()
            )
            sheet = torch.cat([real[0::2, None], sheet, real[1::2, None]], dim=1)
        return metrics, sheet

    def traverse(self) -> Explored | None:
        """Vary single latents of a VAE, or directions in which images of a flow or GAN change most.

        Return None for a diffusion model.
        """
        context, objective = self.context, self.objective
        if isinstance(objective, DiffusionObjective):
            return None
        z, labels = self._start(NUM_POINTS)
        # At temperature 1 a flow's images change most where they break down, so latents have the
        # temperature of its samples.
        flow = context.trained.family == "flow"
        temperature = context.trained.objective.sample_config.temperature if flow else 1.0
        z, reach = temperature * z, temperature * REACH
        count = min(NUM_DIRECTIONS, z.shape[1])
        if isinstance(objective, VAEObjective):
            moved, directions, rows = self._latents_by_kl(objective, z, count)
        else:
            moved = "directions in which images change most"
            moved += f", at temperature {temperature:g}" if flow else ""
            directions, changes = latent_traversal.most_changing_directions(
                self.engine, objective, context.nets, z, labels, count, context.options.seed
            )
            width = STANDARD.bin_width / context.trained.objective.pixels.bin_width
            rows = [
                {"direction": k + 1, "change_per_unit": width * c} for k, c in enumerate(changes)
            ]
        path = traverse_directions(z[0], directions, NUM_COLUMNS, reach)
        sheet = self._decode(path, labels[:1].expand(count))
        distances = feature_distance(context.classifier, sheet[:, 0], sheet[:, -1]).tolist()
        rows = [{**row, "distance_of_ends": d} for row, d in zip(rows, distances, strict=True)]
        return {"moved": moved, "reach": reach, "rows": rows}, sheet

    def _latents_by_kl(
        self, objective: VAEObjective, z: Tensor, count: int
    ) -> tuple[str, Tensor, list[dict[str, Any]]]:
        """Choose the latents with the largest mean KL divergence, nats, on test images."""
        context, device = self.context, self.engine.device
        num_images = min(len(context.test), context.options.num_images)

        def kl_by_latent(rows: Tensor) -> Tensor:
            return objective.kl_by_latent(context.nets, load_batch(context.test, rows, device))

        with torch.no_grad():
            mean = self.engine.map_rows(num_images, kl_by_latent).double().mean(0)
        kl, latents = mean.topk(count)
        rows = [
            {"latent": int(latent), "kl_nats": float(nats)}
            for latent, nats in zip(latents, kl, strict=True)
        ]
        directions = functional.one_hot(latents, z.shape[1]).to(z)
        return f"latents of the largest KL on {num_images} test images", directions, rows

    def _start(self, count: int) -> tuple[Tensor, Tensor]:
        """Return latents [count, D], of test images if there is an encoder, and labels."""
        context, seed = self.context, self.context.options.seed
        if isinstance(self.objective, LatentEncoder):
            index = self.ends[:count]
            z = latent_traversal.encode_on_all(
                self.engine, self.objective, context.nets, context.test, index, seed
            )
            return z, torch.from_numpy(context.test.labels(index.numpy()))
        index = torch.arange(count)
        draws = Draws.of(seed, index.to(self.engine.device))
        in_pairs = uniform_labels(count, context.counts)[index // 2]
        return self.objective.latents(draws), in_pairs

    def _decode(self, z: Tensor, labels: Tensor) -> Tensor:
        objective = self.context.trained.objective
        decoded = latent_traversal.decode_on_all(
            self.engine, self.objective, self.context.nets, z, labels, objective.sample_config.batch
        )
        return objective.pixels.convert(decoded, STANDARD)

    def sweep(self, settings: list[dict[str, Any]]) -> Explored:
        """Sample with the same draws at each setting; return the metrics and a sheet of the images.

        The metrics are those of each setting and, to compare, of real test images.
        """
        context, options = self.context, self.context.options
        labels = labels_by_frequency(options.num_images, context.counts)
        real_statistics = context.features_of(context.train).statistics
        quality = SampleQuality(context.classifier, real_statistics, context.class_conditional)
        fixed = {} if options.sampler is None else {"sampler": options.sampler}
        rows, sheet = sweep_sampler(
            self.engine, context.trained.objective, context.nets, quality, settings, labels,
            options.num_shown, options.seed, **fixed,
        )  # fmt: skip
        test_labels = context.test.labels(np.arange(len(context.test)))
        if is_balanced(context.counts):
            index = balanced_subset(test_labels, options.num_images, options.seed)
        else:  # with classes as frequent as in the data, like the generated ones
            index = permutation(options.seed, 0, len(test_labels)).numpy()[: options.num_images]
        real = to_input(context.test.images(index), self.engine.device)
        found = {
            "varied": list(settings[0]),
            "num_images": options.num_images,
            "labels": context.label_policy(),
            "real": quality(real, torch.from_numpy(test_labels[index])),
            "rows": rows,
        }
        if "steps" in settings[0]:
            found["sampler"] = options.sampler or context.trained.objective.sample_config.sampler
        return found, sheet


def choose_settings(
    options: Namespace, trained: TrainedRun
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the settings to sweep and notes on what is left out.

    Raise UserError for an option of another family or a bad value.
    """
    objective, notes = trained.objective, []
    fields = vars(objective.sample_config)
    own = [name for name in VALUES if name in fields]
    known = own + ["sampler"] * ("sampler" in fields)
    refuse_options_of_other_families(options, (*VALUES, "sampler"), known, trained.family)
    if isinstance(objective, DiffusionObjective):
        if objective.num_classes is None or objective.config.label_drop == 0:
            own.remove("guidance")
            lacks = "classes" if objective.num_classes is None else "diffusion.label_drop"
            notes.append(f"Guidance is left out: the run was trained without {lacks}.")
        if options.steps is None:  # a schedule may be shorter than the default values
            total = objective.schedule.num_timesteps
            few = [n for n in VALUES["steps"].split(",") if int(n) <= total]
            options.steps = ",".join(few or [str(total)])
    values = {name: _values(name, options[name] or VALUES[name], objective) for name in own}
    return [dict(zip(values, v, strict=True)) for v in itertools.product(*values.values())], notes


def _values(name: str, text: str, objective: Objective) -> Sequence[float]:
    if isinstance(objective, DiffusionObjective) and name == "steps":
        return read_steps(text, objective)
    values = read_list(f"--{name}", text, float)
    for value in values:
        if not (value >= 0 if name == "guidance" else value > 0) or value == math.inf:
            bound = "0 or more" if name == "guidance" else "a number above 0"
            raise UserError(f"--{name} names {value}: choose {bound}")
    return values


def explore(options: Namespace, engine: Engine, out: Path) -> dict[str, Any]:
    """Explore a run; the first process writes the sheets."""
    check_range(options, "--", "num_shown", "num_pairs", "epochs", min=1, max=MAX_SAMPLES)
    check_range(options, "--", "num_images", min=2, max=MAX_SAMPLES)
    folder = Path(options.run)
    trained = load_run_on_all(engine, folder, options.checkpoint)
    check_folder("--out", out)
    if not isinstance(trained.objective, LatentDecoder):
        raise UserError(
            f"{folder} holds a {trained.family} run, which has no latents to explore: "
            "use launch/sample.py"
        )
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

    def add_sheet(name: str, caption: str, sheet: Tensor) -> None:
        found["sheets"].append({"file": f"{name}.png", "caption": caption})
        if engine.is_main:
            save_sheet(out / f"{name}.png", sheet, STANDARD)

    with progress("interpolation"):
        found["interpolation"], sheet = explorer.interpolate()
    between, path = (found["interpolation"][name] for name in ("between", "along"))
    ends = "; the real images at both sides" if between == "test images" else ""
    add_sheet("interpolation", f"Interpolation between {between} along a {path}{ends}.", sheet)
    with progress("traversal"):
        traversal = explorer.traverse()
    if traversal is not None:
        found["traversal"], sheet = traversal
        moved, reach = found["traversal"]["moved"], f"{found['traversal']['reach']:g}"
        caption = f"Traversal: {moved}, from -{reach} to {reach}, a row for each."
        add_sheet("traversal", caption, sheet)
    with progress("sampler settings"):
        found["settings"], sheet = explorer.sweep(settings)
    for name, caption, rows in sheets_of(settings):
        add_sheet(name, caption, sheet[rows])
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
    out = Path(options.out or Path(options.run) / "explored")
    with contextlib.closing(start_engine("no")) as engine:
        found = explore(options, engine, out)
        if engine.is_main:
            write_whole(out / "exploration.json", json.dumps(found, indent=1) + "\n")
            print_tables(found)
            save_sweep_plots(found["settings"], out / "quality.png")
            print(f"sheets, metrics and plot: {out}")
