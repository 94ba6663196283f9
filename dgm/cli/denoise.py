"""Noise real test images partially and denoise them: `python launch/denoise.py RUN`.

Images are noised by each number of steps in --steps, of the run's own schedule. A sheet (an
image grid) shows the real images, the noised ones, the denoised ones, and how these differ from the
real ones (grey: not at all). A table and a curve, which goes up to all steps, show how similar
denoised images are to the real ones, and how often a classifier still recognizes their class.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import ArgumentParser, Namespace
from torch import Tensor

from dgm import images
from dgm.cli.eval_context import EvalContext
from dgm.cli.load_run import TrainedRun, load_run_on_all, open_train_data
from dgm.cli.parser import make_options_parser, parse_options
from dgm.cli.path_checks import check_folder
from dgm.cli.study import add_study_options, read_steps, save_sheet
from dgm.common.atomic_io import write_whole
from dgm.common.errors import UserError
from dgm.common.progress import progress
from dgm.common.validation import check_range
from dgm.diffusion import sdedit
from dgm.diffusion.objective import DiffusionObjective
from dgm.evaluation.class_labels import balanced_subset
from dgm.evaluation.classifier import classify
from dgm.evaluation.image_similarity import MIN_SIDE, feature_distance, psnr, ssim
from dgm.preprocessing import STANDARD
from dgm.report.figures import save_denoising_curves
from dgm.rng import Draws
from dgm.training.engine import Engine
from dgm.training.process_settings import start_engine

_BATCH = 100  # images at a time


def make_parser() -> ArgumentParser:
    """Return the parser of the command line."""
    parser = make_options_parser(__doc__)
    add_study_options(parser, "run folder of a diffusion model", "denoised")
    parser.add_argument(
        "--steps", default="50,10,5", help="numbers of noising steps, comma-separated"
    )
    parser.add_argument("--num_images", type=int, default=200, help="test images to evaluate")
    parser.add_argument("--curve", type=int, default=10, help="points of the curve; 0 draws none")
    parser.add_argument(
        "--evaluations", type=int, default=50,
        help="maximum network evaluations per image; with fewer than --steps, steps are skipped",
    )  # fmt: skip
    parser.add_argument("--sampler", choices=["ddpm", "ddim", "dpmpp_2m", "heun"], default="ddpm")
    parser.add_argument(
        "--guidance", type=float, default=1.0, help="classifier-free guidance scale; 1 is none"
    )
    return parser


class Denoiser:
    """Noises and denoises test images, by different numbers of steps."""

    def __init__(self, context: EvalContext, objective: DiffusionObjective):
        """Choose the test images, balanced by class."""
        self.context, self.objective, options = context, objective, context.options
        device = context.engine.device
        labels = context.test.labels(np.arange(len(context.test)))
        self.index = balanced_subset(labels, options.num_images, options.seed)
        self.pixels = torch.from_numpy(context.test.images(self.index)).to(device)
        self.labels = torch.from_numpy(labels[self.index]).to(device)
        self.real = objective.pixels.scale(self.pixels)
        self.draw_index = torch.from_numpy(self.index).to(device)

    def __call__(self, steps: int) -> tuple[dict[str, float], Tensor]:
        """Return metrics at `steps`, and a sheet [4, shown, C, H, W] in [-1, 1].

        Collective: call on all ranks.
        """

        def noise_and_denoise(own: Tensor) -> Tensor:
            return torch.cat([self._noise_and_denoise(rows, steps) for rows in own.split(_BATCH)])

        engine = self.context.engine
        with progress(f"denoising from {steps} steps", len(self.index)):
            noised, denoised = engine.map_rows(len(self.index), noise_and_denoise).unbind(1)
        rows = (self.real, noised, denoised, (denoised - self.real) / 2)
        sheet = torch.stack([row[: self.context.options.num_shown].float() for row in rows])
        return {"steps": steps, **self._metrics(noised, denoised)}, sheet.clamp(-1, 1)

    def _noise_and_denoise(self, rows: Tensor, steps: int) -> Tensor:
        """Return the images of these rows noised and denoised: [n, 2, C, H, W]."""
        options, rows = self.context.options, rows.to(self.real.device)
        draws = Draws.of(options.seed, self.draw_index[rows])
        noised = sdedit.noise(self.objective, self.pixels[rows], draws, steps)
        denoised = sdedit.denoise(
            self.objective, self.context.nets, noised, self.labels[rows], draws, steps,
            options.sampler, options.evaluations, options.guidance,
        )  # fmt: skip
        return torch.stack([noised, denoised], dim=1)

    def _metrics(self, noised: Tensor, denoised: Tensor) -> dict[str, float]:
        net, pixels = self.context.classifier, self.objective.pixels
        real = pixels.to_levels(self.real)
        metrics: dict[str, float] = {}
        for name, x in (("noised", noised), ("denoised", denoised)):
            levels = pixels.to_levels(x.float())
            correct = classify(net, images.to_uint8(x, pixels)) == self.labels.cpu().numpy()
            distance = feature_distance(net, *map(STANDARD.from_levels, (levels, real)))
            metrics |= {
                f"psnr_db_{name}": float(psnr(levels, real).mean()),
                f"ssim_{name}": float(ssim(levels, real).mean()),
                f"feature_distance_{name}": float(distance.mean()),
                f"class_seen_{name}": float(correct.mean()),
            }
        return metrics


def denoise(options: Namespace, engine: Engine, out: Path) -> dict[str, Any]:
    """Denoise by each number of steps, and by those of the curve; write the sheets."""
    check_range(options, "--", "num_images", "num_shown", "evaluations", "epochs", min=1)
    check_range(options, "--", "curve", min=0, max=1000)
    check_range(options, "--", "guidance", min=0)
    trained = load_run_on_all(engine, Path(options.run), options.checkpoint)
    objective = check_run(options.run, trained)
    check_folder("--out", out)
    total, chosen_steps = objective.schedule.num_timesteps, read_steps(options.steps, objective)
    data = open_train_data(Path(options.run), trained)
    context = EvalContext(options, engine, trained, *data)
    denoiser = Denoiser(context, objective)
    rows = []
    for steps in chosen_steps:
        metrics, sheet = denoiser(steps)
        rows.append(metrics)
        if engine.is_main:
            save_sheet(out / f"steps-{steps:04d}.png", sheet, objective.pixels)
    curve = [denoiser(steps)[0] for steps in curve_steps(total, options.curve)]
    classes = classify(context.classifier, context.test.images(denoiser.index))
    return {
        "images_seen": trained.images_seen,
        "num_images": len(denoiser.index),
        "num_timesteps": total,
        "sampler": options.sampler,
        "most_evaluations": options.evaluations,
        "class_seen_real": float((classes == denoiser.labels.cpu().numpy()).mean()),
        "steps": rows,
        "curve": curve,
    }


def check_run(name: str, trained: TrainedRun) -> DiffusionObjective:
    """Return the objective of a diffusion model's run; raise UserError for another run."""
    objective = trained.objective
    if not isinstance(objective, DiffusionObjective):
        raise UserError(f"{name} holds a {trained.family} run: name a diffusion run")
    side = min(objective.image_shape[:2])
    if side < MIN_SIDE:
        raise UserError(
            f"{name} was trained on images of side {side}, too small for SSIM: name a run on "
            f"images of {MIN_SIDE} or more"
        )
    return objective


def curve_steps(total: int, points: int) -> list[int]:
    """Return up to `points` numbers of steps, logarithmically spaced, and `total`."""
    if points == 0:
        return []
    return sorted(
        {max(1, round(total ** (i / max(points - 1, 1)))) for i in range(points)} | {total}
    )


def print_table(found: dict[str, Any]) -> None:
    """Print a row for each number of steps."""
    print(f"{found['num_images']} test images; the classifier recognizes the class of "
          f"{found['class_seen_real']:.1%} of the real ones")  # fmt: skip
    print(f"{'steps':>6} {'':>9} {'PSNR dB':>8} {'SSIM':>7} {'features':>9} {'class seen':>11}")
    for row in sorted(found["steps"] + found["curve"], key=lambda row: row["steps"]):
        for name in ("noised", "denoised"):
            first = row["steps"] if name == "noised" else ""
            print(
                f"{first:>6} {name:>9} {row[f'psnr_db_{name}']:>8.2f} {row[f'ssim_{name}']:>7.3f} "
                f"{row[f'feature_distance_{name}']:>9.4f} {row[f'class_seen_{name}']:>11.1%}"
            )


def main() -> None:
    """Denoise from the command line: a table on screen; sheets, a curve and JSON in a folder."""
    options = parse_options(make_parser(), sys.argv[1:])
    out = Path(options.out or Path(options.run) / "denoised")
    with contextlib.closing(start_engine("no")) as engine:
        found = denoise(options, engine, out)
        if engine.is_main:
            write_whole(out / "denoising.json", json.dumps(found, indent=1) + "\n")
            print_table(found)
            if found["curve"]:
                save_denoising_curves(found["curve"], found["class_seen_real"], out / "curve.png")
            print(f"sheets, metrics and curve: {out}")
