"""Evaluate trained runs: `python launch/evaluate.py runs/a runs/b`.

class_consistency: how often a classifier, trained on the real images, assigns generated images to
the requested class. distances: FID, KID and Inception score with --features inception, the same
under other names in the features of a classifier of the real images. precision_recall, with density
and coverage. diversity: within each class. memorization: distance to the nearest training images.
bits_per_dim: of the test images; a flow's are exact for dequantized data, others a bound.
bits_per_dim_ode: by a diffusion model's probability-flow ODE. loss_by_timestep: of a diffusion
model, by quarter of its timesteps. reconstruction: how far a VAE's reconstructions are from the
test images. cost: parameters, seconds for an image.
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
from dgm.cli.eval_context import EvalContext
from dgm.cli.load_run import load_run_on_all, open_train_data
from dgm.cli.metric_groups import METRIC_GROUPS, compute_metrics
from dgm.cli.metric_selection import choose_metrics, refuse_published_names
from dgm.cli.parser import make_options_parser, parse_options, path_word
from dgm.cli.path_checks import check_folder
from dgm.common.atomic_io import write_whole
from dgm.common.errors import UserError
from dgm.common.json_files import read_object
from dgm.common.progress import progress
from dgm.common.validation import check_range
from dgm.diffusion.ode import MIN_STEPS
from dgm.evaluation.online_eval import MAX_SAMPLES
from dgm.report.evaluation_table import table
from dgm.report.read_run import state_of
from dgm.training.engine import Engine
from dgm.training.process_settings import start_engine


def make_parser() -> ArgumentParser:
    """Return the parser of the command line."""
    parser = make_options_parser(__doc__)
    add = parser.add_argument
    add("runs", nargs="+", type=path_word, help="run folders")
    known = ", ".join(METRIC_GROUPS)
    add("--metrics", help=f"comma-separated, of {known}; default by family")
    add(
        "--features",
        choices=["classifier", "inception"],
        default="classifier",
        help="of a classifier trained on the run's images, or of Inception, as for FID and KID",
    )
    add(
        "--weights", type=path_word, help="file of Inception's weights; default in the cache folder"
    )
    add("--against", choices=["train", "test"], default="train", help="real images to compare with")
    add(
        "--num_images",
        type=int,
        help="generated images per seed, classes as frequent as in the data; default 500",
    )
    add("--per_class", type=int, help="generated images of each class, equally many")
    add("--seeds", type=int, default=1, help="number of seeds to average over")
    add("--checkpoint", help="by images seen, or best; default the newest")
    add("--num_test", type=int, help="test images for bits_per_dim and the loss; default all")
    add(
        "--importance_samples",
        type=int,
        default=0,
        help="samples of a VAE's importance-weighted bound; 0: none",
    )
    add("--ode_steps", type=int, help="steps of bits_per_dim_ode, 8 or more; default: as needed")
    add(
        "--ode_tolerance",
        type=float,
        default=0.01,
        help="largest discretization error of bits_per_dim_ode, bits per dimension",
    )
    add("--epochs", type=int, help="epochs of the classifier; default: until 20,000 images seen")
    add("--seed", type=int, default=1, help="seed of the classifier, and first of --seeds")
    add("--test_shards", type=path_word, help="test shards; default: from the run's source")
    return parser  # fmt: skip


def check(options: Namespace) -> None:
    """Raise UserError for an option out of range or in conflict with another."""
    check_range(options, "--", "per_class", "num_images", min=1, max=MAX_SAMPLES)
    check_range(options, "--", "seeds", "epochs", "num_test", min=1)
    check_range(options, "--", "ode_steps", min=MIN_STEPS)
    check_range(options, "--", "ode_tolerance", above=0)
    check_range(options, "--", "importance_samples", min=0)
    if options.per_class and options.num_images:
        raise UserError(
            f"--per_class {options.per_class} and --num_images {options.num_images} exclude each "
            "other: leave one out"
        )
    options.num_images = options.num_images or 500
    if options.weights and options.features != "inception":
        raise UserError(f"--weights is {options.weights}: give --features inception too")


def open_context(options: Namespace, engine: Engine, folder: Path) -> EvalContext:
    """Return the context of a run at --checkpoint; print a note if it is still being written."""
    trained = load_run_on_all(engine, folder, options.checkpoint)
    check_folder("the run folder", folder)
    with contextlib.suppress(UserError):  # of a damaged log, which evaluation does not read
        if engine.is_main and state_of(folder) == "still being written":
            print(
                f"{folder} is still being written: evaluating its checkpoint of "
                f"{trained.images_seen:,} images seen",
                flush=True,
            )
    return EvalContext(options, engine, trained, *open_train_data(folder, trained), folder)


def evaluate(context: EvalContext, names: list[str]) -> dict[str, Any]:
    """Return the metrics of a run, as they are kept in evaluation.json."""
    found: dict[str, Any] = {
        "images_seen": context.trained.images_seen,
        "checkpoint": context.trained.fingerprint,
    }
    for name in names:
        with progress(f"{context.folder.name}: {name}"):
            key, metrics = compute_metrics(context, name)
        found[key] = metrics
    return found


def save(found: dict[str, Any], path: Path) -> None:
    """Write `evaluation.json`, keeping other metrics of the same checkpoint."""
    before = read_object(path) or {}
    if path.exists() and not before:
        warnings.warn(f"{path} is damaged and is replaced", stacklevel=2)
    same = before.get("checkpoint") == found["checkpoint"]
    write_whole(path, json.dumps({**(before if same else {}), **found}, indent=1) + "\n")


def main() -> None:
    """Evaluate from the command line: a table on screen, JSON in each run folder."""
    refuse_published_names(sys.argv[1:])
    options = parse_options(make_parser(), sys.argv[1:])
    check(options)
    folders = list(dict.fromkeys(Path(folder) for folder in options.runs))
    short = [folder.resolve().name for folder in folders]
    run_names = short if len(set(short)) == len(short) else [str(folder) for folder in folders]
    with contextlib.closing(start_engine("no")) as engine:
        contexts = [open_context(options, engine, folder) for folder in folders]
        chosen = [choose_metrics(context) for context in contexts]  # errors before any work
        if engine.is_main and len({identify(context.train) for context in contexts}) > 1:
            warnings.warn(
                "the runs were trained on different images: metrics in the features of each "
                "one's classifier cannot be compared", stacklevel=2,
            )  # fmt: skip
        found = {}
        for run, context, names in zip(run_names, contexts, chosen, strict=True):
            found[run] = evaluate(context, names)
            if engine.is_main:
                save(found[run], context.folder / "evaluation.json")
            context.clear()
        if engine.is_main:
            print("\n".join(table(found)))
            print(f"written to {', '.join(str(f / 'evaluation.json') for f in folders)}")
