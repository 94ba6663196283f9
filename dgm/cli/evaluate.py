"""Measure trained runs: `python launch/evaluate.py runs/a runs/b`.

class_consistency: how often a classifier, trained on the real images, sees in generated images the
class that was asked for. distances: FID, KID and Inception score with --features inception, the
same under other names in the features of a net trained on the real images. precision_recall, with
density and coverage. diversity: how various each class is. neighbours: nearest training images.
bits_per_dim: of the test images; a flow's are exact for dequantised data, others a bound.
bits_per_dim_ode: by a diffusion model's probability-flow ODE. loss_by_timestep: of a diffusion
model, by quarter of its timesteps.
reconstruction: how far a VAE's are from the test images. cost: parameters, seconds for an image.
"""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from dgm.cli.assemble import identify
from dgm.cli.eval_context import Subject, open_on_all
from dgm.cli.load_run import open_data
from dgm.cli.metric_selection import choose_measures, refuse_published_names
from dgm.cli.parser import make_options_parser, parse_options, path_word
from dgm.cli.path_checks import check_folder
from dgm.cli.sample import choose_checkpoint
from dgm.cli.sample_metrics import MEASURES
from dgm.cli.start_engine import start_engine
from dgm.common.atomic_io import write_whole
from dgm.common.errors import UserError
from dgm.common.progress import progress
from dgm.common.validation import check_range
from dgm.diffusion.ode import MIN_STEPS
from dgm.evaluation.online_eval import MOST_MADE
from dgm.report.evaluation_table import table
from dgm.report.read_run import state_of
from dgm.training.engine import Engine


def make_parser() -> ArgumentParser:
    """Describe the command line."""
    parser = make_options_parser(__doc__)
    add = parser.add_argument
    add("runs", nargs="+", type=path_word, help="run folders")
    add("--measure", help=f"of {', '.join(MEASURES)}, with commas; default by run")
    add(
        "--features",
        choices=["cifar", "inception"],
        default="cifar",
        help="cifar: of a small net trained on the run's real images; inception: FID and KID",
    )
    add(
        "--weights", type=path_word, help="file of Inception's weights; default in the cache folder"
    )
    add("--against", choices=["train", "test"], default="train", help="real images to compare with")
    add(
        "--num_images",
        type=int,
        help="generated images of each seed, of classes as frequent as in the data; default 500",
    )
    add("--per_class", type=int, help="generated images of each class, equally many")
    add("--seeds", type=int, default=1, help="how many seeds to generate from: mean and spread")
    add("--checkpoint", help="its images seen, or best; default the newest")
    add("--num_test", type=int, help="test images for bits_per_dim and the loss; default all")
    add("--importance_samples", type=int, default=0, help="of a vae's closer bound; default none")
    add("--ode_steps", type=int, help="steps of bits_per_dim_ode, 8 or more; default: as needed")
    add(
        "--ode_tolerance",
        type=float,
        default=0.01,
        help="largest discretisation error of bits_per_dim_ode, bits per dimension",
    )
    add("--epochs", type=int, help="of the classifier; default until 20,000 images")
    add("--seed", type=int, default=1, help="of classifier and images; the first of --seeds")
    add("--test_shards", type=path_word, help="real images to test on; default as the run's source")
    return parser  # fmt: skip


def check(options: Namespace) -> None:
    """Raise UserError where an option has no meaning."""
    check_range(options, "--", "per_class", "num_images", least=1, most=MOST_MADE)
    check_range(options, "--", "seeds", "epochs", "num_test", least=1)
    check_range(options, "--", "ode_steps", least=MIN_STEPS)
    check_range(options, "--", "ode_tolerance", above=0)
    check_range(options, "--", "importance_samples", least=0)
    if options.per_class and options.num_images:
        raise UserError(
            f"--per_class {options.per_class} and --num_images {options.num_images} say the same: "
            "leave one out"
        )
    options.num_images = options.num_images or 500
    if options.weights and options.features != "inception":
        raise UserError(f"--weights is {options.weights}: give --features inception too")


def open_subject(options: Namespace, engine: Engine, folder: Path) -> Subject:
    """Open a run at the checkpoint asked for; says where the run is still being written."""
    trained = open_on_all(engine, folder, choose_checkpoint(options.checkpoint))
    check_folder("the run folder", folder)
    with contextlib.suppress(UserError):  # a damaged log is no matter here
        if engine.is_main and state_of(folder) == "still being written":
            print(
                f"{folder} is still being written: measured is its checkpoint of "
                f"{trained.images_seen:,} images seen",
                flush=True,
            )
    return Subject(options, engine, trained, *open_data(folder, trained), folder)


def measure(subject: Subject, names: list[str]) -> dict[str, Any]:
    """Measure what was asked for."""
    trained = subject.trained
    found: dict[str, Any] = {
        "images_seen": trained.images_seen,
        "checkpoint": trained.fingerprint,
    }
    for name in names:
        with progress(f"{subject.folder.name}: {name}"):
            suffix = f"_{subject.features.name}" if MEASURES[name].by_features else ""
            found[name + suffix] = MEASURES[name].measure(subject)
    return found


def keep(found: dict[str, Any], path: Path) -> None:
    """Write `evaluation.json`; other measures of the same checkpoint stay in it."""
    before: Any = {}
    if path.exists():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            warnings.warn(f"{path} is written anew: it is damaged", stacklevel=2)
    same = isinstance(before, dict) and before.get("checkpoint") == found["checkpoint"]
    write_whole(path, json.dumps({**(before if same else {}), **found}, indent=1) + "\n")


def name_runs(folders: list[Path]) -> list[str]:
    """Name runs by their folders, by whole paths where two have one name."""
    short = [folder.resolve().name for folder in folders]
    return short if len(set(short)) == len(short) else [str(folder) for folder in folders]


def main() -> None:
    """Measure by the command line: a table on screen, JSON in each run folder."""
    refuse_published_names(sys.argv[1:])
    options = parse_options(make_parser(), sys.argv[1:])
    check(options)
    folders = list(dict.fromkeys(Path(folder) for folder in options.runs))
    engine = start_engine("no")
    try:
        subjects = [open_subject(options, engine, folder) for folder in folders]
        chosen = [choose_measures(subject) for subject in subjects]  # all mistakes before any work
        if engine.is_main and len({identify(subject.real) for subject in subjects}) > 1:
            warnings.warn(
                "the runs were trained on different images: figures in features of a net of their "
                "own do not compare", stacklevel=2,
            )  # fmt: skip
        found = {}
        for name, subject, names in zip(name_runs(folders), subjects, chosen, strict=True):
            found[name] = measure(subject, names)
            if engine.is_main:
                keep(found[name], subject.folder / "evaluation.json")
            subject.forget()
        if engine.is_main:
            print("\n".join(table(found)))
            print(f"written to {', '.join(str(f / 'evaluation.json') for f in folders)}")
    finally:
        engine.close()
