"""Noise real test images a part of the way and denoise them: `python launch/denoise.py RUN`.

For each number of --steps, of the run's own schedule: a sheet of the real images, the noised ones,
the denoised ones, and what the model changed (grey: nothing); how near the denoised ones are to the
real ones, and how often a classifier still sees their class. The same as a curve, up to all steps.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import ArgumentParser, Namespace
from torch import Tensor

from dgm import images
from dgm.cli.eval_context import Subject
from dgm.cli.load_run import open_data, open_trained
from dgm.cli.parser import make_options_parser, parse_options, path_word, read_list
from dgm.cli.path_checks import check_folder
from dgm.cli.sample import choose_checkpoint
from dgm.cli.start_engine import start_engine
from dgm.common.atomic_io import write_whole
from dgm.common.errors import UserError
from dgm.common.progress import progress
from dgm.common.validation import check_range
from dgm.diffusion import sdedit
from dgm.diffusion.objective import DiffusionObjective
from dgm.evaluation.classifier import classify
from dgm.evaluation.image_similarity import SMALLEST, feature_distance, psnr, ssim
from dgm.evaluation.subset import in_turn
from dgm.preprocessing import STANDARD
from dgm.report.denoising import save_curves
from dgm.rng import Draws
from dgm.training.engine import Engine

_BATCH = 100  # images at a time


def make_parser() -> ArgumentParser:
    """Describe the command line."""
    parser = make_options_parser(__doc__)
    parser.add_argument("run", type=path_word, help="run folder of a diffusion model")
    parser.add_argument("--steps", default="50,10,5", help="noising steps, with commas")
    parser.add_argument("--num_images", type=int, default=200, help="test images to measure")
    parser.add_argument("--num_shown", type=int, default=10, help="of them on the sheets")
    parser.add_argument("--curve", type=int, default=10, help="points of the curve; 0 draws none")
    parser.add_argument(
        "--evaluations", type=int, default=50,
        help="of the net for an image, at most; fewer than the steps skip some of them",
    )  # fmt: skip
    parser.add_argument("--sampler", choices=["ddpm", "ddim", "dpmpp_2m", "heun"], default="ddpm")
    parser.add_argument("--guidance", type=float, default=1.0, help="to the class; 1 is none")
    parser.add_argument("--checkpoint", help="its images seen, or best; default the newest")
    parser.add_argument("--out", type=path_word, help="folder to write to; default RUN/denoised")
    parser.add_argument("--epochs", type=int, help="of the classifier; default until 20,000 images")
    parser.add_argument("--seed", type=int, default=1, help="of classifier, images and noise")
    parser.add_argument(
        "--test_shards", type=path_word, help="real images; default as the run's source"
    )
    return parser


class Denoiser:
    """Test images, and what becomes of them by so many steps of noise."""

    def __init__(self, subject: Subject, objective: DiffusionObjective):
        """Choose the test images, classes in turn."""
        self.subject, self.objective, options = subject, objective, subject.options
        device = subject.engine.device
        labels = subject.test.labels(np.arange(len(subject.test)))
        self.index = in_turn(labels, options.num_images, options.seed)
        pixels = subject.test.images(self.index)
        self.pixels, self.labels = (
            torch.from_numpy(part).to(device) for part in (pixels, labels[self.index])
        )
        self.real = objective.pixels.scale(self.pixels)
        self.numbers = torch.from_numpy(self.index).to(device)

    def __call__(self, steps: int) -> tuple[dict[str, float], Tensor]:
        """Measure `steps`, each process a part of the images.

        Give figures and a sheet [4, shown, C, H, W] in [-1, 1].
        """

        def both(mine: Tensor) -> Tensor:
            parts = [self._noise_and_denoise(rows, steps) for rows in mine.split(_BATCH)]
            return torch.cat(parts)

        with progress(f"denoising from {steps} steps", len(self.index)):
            noised, made = self.subject.engine.map_rows(len(self.index), both).unbind(1)
        first = (self.real, noised, made, (made - self.real) / 2)
        sheet = torch.stack([part[: self.subject.options.num_shown].float() for part in first])
        return {"steps": steps, **self._figures(noised, made)}, sheet.clamp(-1, 1)

    def _noise_and_denoise(self, rows: Tensor, steps: int) -> Tensor:
        """Give some of the images noised and denoised, [n, 2, C, H, W]."""
        options, rows = self.subject.options, rows.to(self.real.device)
        draws = Draws.of(options.seed, self.numbers[rows])
        noised = sdedit.noise(self.objective, self.pixels[rows], draws, steps)
        made = sdedit.denoise(
            self.objective, self.subject.nets, noised, self.labels[rows], draws, steps,
            options.sampler, options.evaluations, options.guidance,
        )  # fmt: skip
        return torch.stack([noised, made], dim=1)

    def _figures(self, noised: Tensor, made: Tensor) -> dict[str, float]:
        net, real, pixels = self.subject.classifier, self.real, self.objective.pixels
        found: dict[str, float] = {}
        levels = pixels.to_levels(real)
        for name, x in (("noised", noised), ("denoised", made)):
            own = pixels.to_levels(x.float())
            right = classify(net, images.to_uint8(x, pixels)) == self.labels.cpu().numpy()
            seen, seen_real = (STANDARD.from_levels(part) for part in (own, levels))
            found |= {
                f"psnr_db_{name}": float(psnr(own, levels).mean()),
                f"ssim_{name}": float(ssim(own, levels).mean()),
                f"feature_distance_{name}": float(feature_distance(net, seen, seen_real).mean()),
                f"class_seen_{name}": float(right.mean()),
            }
        return found


def measure(options: Namespace, engine: Engine) -> dict[str, Any]:
    """Denoise from each number of steps, and from those of the curve; write the sheets."""
    check_range(options, "--", "num_images", "num_shown", "evaluations", "epochs", least=1)
    check_range(options, "--", "curve", least=0, most=1000)
    check_range(options, "--", "guidance", least=0)
    trained = open_trained(Path(options.run), choose_checkpoint(options.checkpoint))
    objective = trained.objective
    if not isinstance(objective, DiffusionObjective):
        raise UserError(
            f"{options.run} holds a {trained.family} run: name one of a diffusion model"
        )
    if min(objective.image_shape[:2]) < SMALLEST:
        raise UserError(
            f"{options.run} was trained on images of side {min(objective.image_shape[:2])}, too "
            f"small for SSIM: name a run on images of {SMALLEST} or more"
        )
    check_folder("--out", folder_of(options))
    total = objective.schedule.num_timesteps
    asked = choose_steps(options.steps, total)
    subject = Subject(options, engine, trained, *open_data(Path(options.run), trained))
    denoiser = Denoiser(subject, objective)
    found = []
    for steps in asked:
        figures, sheet = denoiser(steps)
        found.append(figures)
        if engine.is_main:
            pixels = images.to_uint8(sheet.flatten(0, 1), objective.pixels)
            images.save_png(
                folder_of(options) / f"steps-{steps:04d}.png", images.grid(pixels, sheet.shape[1])
            )
    curve = [denoiser(steps)[0] for steps in curve_of(total, options.curve)]
    seen = classify(subject.classifier, subject.test.images(denoiser.index))
    return {
        "images_seen": trained.images_seen,
        "num_images": len(denoiser.index),
        "num_timesteps": total,
        "sampler": options.sampler,
        "most_evaluations": options.evaluations,
        "class_seen_real": float((seen == denoiser.labels.cpu().numpy()).mean()),
        "steps": found,
        "curve": curve,
    }


def folder_of(options: Namespace) -> Path:
    """Say where sheets and figures go."""
    return Path(options.out or Path(options.run) / "denoised")


def choose_steps(text: str, total: int) -> list[int]:
    """Read numbers of steps; raises UserError where the schedule has no such."""
    steps = read_list("--steps", str(text), int)
    for step in steps:
        if not 1 <= step <= total:
            raise UserError(
                f"--steps names {step}: choose 1 to {total}, the run's diffusion.num_timesteps"
            )
    return steps


def curve_of(total: int, points: int) -> list[int]:
    """Choose numbers of steps, closer to each other where there are few, up to all."""
    if points == 0:
        return []
    return sorted(
        {max(1, round(total ** (i / max(points - 1, 1)))) for i in range(points)} | {total}
    )


def show(found: dict[str, Any]) -> None:
    """Print a table, a row for each number of steps."""
    print(f"{found['num_images']} test images; the classifier sees the class of "
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
    """Denoise by the command line: a table on screen, sheets, a curve and JSON in a folder."""
    options = parse_options(make_parser(), sys.argv[1:])
    engine = start_engine("no")
    try:
        found = measure(options, engine)
        if engine.is_main:
            out = folder_of(options)
            write_whole(out / "denoising.json", json.dumps(found, indent=1) + "\n")
            show(found)
            if found["curve"]:
                save_curves(found["curve"], found["class_seen_real"], out / "curve.png")
            print(f"sheets, figures and curve: {out}")
    finally:
        engine.close()
