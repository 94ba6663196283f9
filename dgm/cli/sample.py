"""Sample from a trained run: `python launch/sample.py runs/ddpm-small --per_class 10`."""

from __future__ import annotations

import contextlib
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from jsonargparse import ArgumentParser, Namespace

from dgm import images
from dgm.cli.load_run import TrainedRun, load_run_on_all
from dgm.cli.parser import make_options_parser, parse_options, path_word
from dgm.cli.path_checks import choose_outputs
from dgm.cli.study import refuse_options_of_other_families
from dgm.common.atomic_dirs import new_folder
from dgm.common.errors import UserError
from dgm.common.progress import progress
from dgm.common.suggestions import did_you_mean
from dgm.common.validation import check_range
from dgm.diffusion.samplers import SamplerName
from dgm.nn.compiling import compile_net
from dgm.nn.layers import use_kernels
from dgm.training.engine import Engine
from dgm.training.process_settings import start_engine
from dgm.training.sampling import sample_distributed

NUM_SHOWN = 20  # images of a class in the PNG; the .npz holds all
_INDEX_BITS = 24  # bits for the number of an image within its class
MAX_PER_CLASS = 2**_INDEX_BITS
KNOBS = ("sampler", "steps", "guidance", "eta", "temperature", "batch")


def make_parser() -> ArgumentParser:
    """Return the parser of the command line."""
    parser = make_options_parser(__doc__)
    parser.add_argument("run", type=path_word, help="run folder")
    parser.add_argument("--per_class", type=int, default=1, help="images of each class")
    parser.add_argument("--classes", help="names or numbers, comma-separated; default all")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other images")
    parser.add_argument("--checkpoint", help="by images seen, or best; default the newest")
    parser.add_argument("--average", type=bool, default=True, help="use the EMA weights")
    parser.add_argument(
        "--out",
        type=path_word,
        help="FILE.png or FILE.npz (the other is written beside it), or FOLDER/, new or empty, for "
        "single images as CLASS-00000.png with images.npz; default RUN/generated/...",
    )
    names = get_args(SamplerName)
    parser.add_argument("--sampler", choices=names, help="default: the run's sample.sampler")
    parser.add_argument("--steps", type=int, help="default: the run's sample.steps")
    parser.add_argument("--guidance", type=float, help="default: the run's sample.guidance")
    parser.add_argument("--eta", type=float, help="noise of ddim, 0 to 1")
    parser.add_argument("--temperature", type=float, help="scale of the latents (gan, vae, flow)")
    parser.add_argument("--batch", type=int, help="images per forward pass; changes no image")
    parser.add_argument(
        "--compile", type=bool, default=False, help="compile the nets; worthwhile for many images"
    )
    return parser


def choose_classes(trained: TrainedRun, text: str | None) -> list[int]:
    """Return the labels of names or numbers; raise UserError for an unknown one."""
    if text is None:
        return list(range(len(trained.classes)))
    if trained.objective.num_classes is None:
        raise UserError(f"--classes is {text}, but the run was trained without classes: omit it")
    labels = []
    for word in (w.strip() for w in text.split(",")):
        if word in trained.classes:
            labels.append(trained.classes.index(word))
        elif word.isdecimal() and int(word) < len(trained.classes):
            labels.append(int(word))
        else:
            hint = did_you_mean(word, trained.classes)
            raise UserError(
                f"--classes names '{word}', which the run does not know: {hint}choose from "
                f"{', '.join(trained.classes)}"
            )
    return labels


def choose_knobs(options: Namespace, trained: TrainedRun) -> dict[str, Any]:
    """Return the given settings of the sampler; raise UserError for one of another family."""
    own = vars(trained.objective.sample_config)
    refuse_options_of_other_families(options, KNOBS, own, trained.family)
    return {name: options[name] for name in KNOBS if options[name] is not None}


def choose_shown(
    num_classes: int, per_class: int, height: int, width: int
) -> tuple[list[int], int]:
    """Return the indices of the images that the PNG shows, and its number of columns.

    Of many classes it shows some, evenly spaced.
    """
    if per_class == 1:  # as many classes in a row as fit
        rows, columns = images.fit_grid(num_classes, num_classes, height, width)
        return images.evenly_spaced(num_classes, min(num_classes, rows * columns)), columns
    rows, columns = images.fit_grid(num_classes, min(per_class, NUM_SHOWN), height, width)
    classes = images.evenly_spaced(num_classes, rows)
    return [k * per_class + number for k in classes for number in range(columns)], columns


def save_image_folder(
    folder: Path, pixels: np.ndarray, labels: np.ndarray | None, classes: list[str]
) -> None:
    """Write uint8 [N, H, W, C] as a PNG each, and as `images.npz`, in a new folder.

    A flat folder, as pytorch-fid, clean-fid and torch-fidelity read it. Files are named by class
    and number within it: CLASS-00000.png, without classes 00000.png. The folder is written
    atomically.
    """
    counts: Counter[str] = Counter()
    with new_folder(folder.resolve(), identity="images.npz") as partial:
        for k, image in enumerate(pixels):
            name = "" if labels is None else re.sub(r"[^\w.+-]", "_", classes[labels[k]]) + "-"
            images.save_png(partial / f"{name}{counts[name]:05d}.png", image)
            counts[name] += 1
        images.save_npz(partial / "images.npz", pixels, labels)


def sample(options: Namespace, engine: Engine) -> None:
    """Sample, and write a PNG grid (a row for each class) and an `.npz`, or single images."""
    check_range(options, "--", "per_class", min=1, max=MAX_PER_CLASS)
    outputs = choose_outputs("--out", options.out) if options.out else None
    folder = Path(options.run)
    trained = load_run_on_all(engine, folder, options.checkpoint, options.average)
    classes = choose_classes(trained, options.classes)
    nets = {name: net.to(engine.device) for name, net in trained.nets.items()}
    for net in nets.values():
        use_kernels(net)
        if options.compile:
            compile_net(net)
    labels = torch.tensor(classes).repeat_interleave(options.per_class)
    number = torch.arange(options.per_class).repeat(len(classes))
    # Image k of a class does not depend on the other classes or the count.
    index = (labels << _INDEX_BITS) + number
    knobs = choose_knobs(options, trained)
    with progress("sampling", len(labels)):
        x = sample_distributed(
            engine, trained.objective, nets, index, labels, options.seed, **knobs
        )
    if not engine.is_main:
        return
    pixels = images.to_uint8(x, trained.objective.pixels)
    if outputs is None:
        stem = f"{trained.images_seen:09d}-seed{options.seed}"
        outputs = choose_outputs("--out", str(folder / "generated" / f"{stem}.png"))
    saved_labels = labels.numpy() if trained.objective.num_classes is not None else None
    if outputs.folder is not None:
        save_image_folder(outputs.folder, pixels, saved_labels, trained.classes)
        print(f"{len(pixels)} images: {outputs.folder}/*.png and {outputs.npz}")
        return
    shown, columns = choose_shown(len(classes), options.per_class, *pixels.shape[1:3])
    images.save_png(outputs.png, images.grid(pixels[shown], columns))
    images.save_npz(outputs.npz, pixels, saved_labels)
    part = "" if len(shown) == len(pixels) else f" ({len(shown)} of them)"
    print(f"{len(pixels)} images: {outputs.png}{part} and {outputs.npz}")


def main() -> None:
    """Sample from the command line."""
    options = parse_options(make_parser(), sys.argv[1:])
    with contextlib.closing(start_engine("no")) as engine:
        sample(options, engine)
