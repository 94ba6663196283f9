"""Make images with a trained run: `python launch/sample.py runs/ddpm-small --per_class 10`."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any, Literal, get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from jsonargparse import ArgumentParser, Namespace

from dgm import images
from dgm.compiling import compile_net
from dgm.diffusion.samplers import SamplerName
from dgm.errors import UserError
from dgm.layers import use_kernels
from dgm.limits import check_range
from dgm.train.engine import Engine
from dgm.train.sampling import sample_on_all
from launch.command import make_options_parser, parse_options, path_word, run
from launch.places import check_stem
from launch.trained import Trained, open_trained

SHOWN = 20  # images of a class in the PNG; the .npz holds all
BITS_OF_A_CLASS = 24
MOST_OF_A_CLASS = 2**BITS_OF_A_CLASS
KNOBS = ("sampler", "steps", "guidance", "eta", "temperature", "truncation", "batch")


def make_parser() -> ArgumentParser:
    """Describe the command line."""
    parser = make_options_parser(__doc__)
    parser.add_argument("run", type=path_word, help="run folder")
    parser.add_argument("--per_class", type=int, default=1, help="images of each class")
    parser.add_argument("--classes", help="names or numbers, separated by commas; default all")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other images")
    parser.add_argument("--checkpoint", help="its images seen, or best; default the newest")
    parser.add_argument("--average", type=bool, default=True, help="use the averaged weights")
    parser.add_argument(
        "--out", type=path_word, help="path without ending; default RUN/generated/..."
    )
    names = get_args(SamplerName)
    parser.add_argument("--sampler", choices=names, help="default: the run's sample.sampler")
    parser.add_argument("--steps", type=int, help="default: the run's sample.steps")
    parser.add_argument("--guidance", type=float, help="default: the run's sample.guidance")
    parser.add_argument("--eta", type=float, help="noise of ddim, 0 to 1")
    parser.add_argument("--temperature", type=float, help="of the latents of a vae or flow")
    parser.add_argument("--truncation", type=float, help="of the latents of a gan")
    parser.add_argument("--batch", type=int, help="images per forward pass; changes no image")
    parser.add_argument(
        "--compile", type=bool, default=False, help="compile the nets: pays for many images"
    )
    return parser


def choose_classes(trained: Trained, wanted: str | None) -> list[int]:
    """Turn names or numbers into labels; raises UserError naming an unknown one."""
    if wanted is None:
        return list(range(len(trained.classes)))
    if trained.objective.num_classes is None:
        raise UserError(f"--classes is {wanted}, but the run was trained without classes: omit it")
    labels = []
    for word in (w.strip() for w in wanted.split(",")):
        if word in trained.classes:
            labels.append(trained.classes.index(word))
        elif word.isdecimal() and int(word) < len(trained.classes):
            labels.append(int(word))
        else:
            known = ", ".join(trained.classes)
            raise UserError(f"--classes names '{word}', which the run does not know: {known}")
    return labels


def choose_knobs(options: Namespace, trained: Trained) -> dict[str, Any]:
    """Collect what was given of the family's knobs; raises UserError naming one of another's."""
    given = {name: options[name] for name in KNOBS if options[name] is not None}
    own = [f.name for f in dataclasses.fields(trained.objective.sample_config)]
    for name in given.keys() - set(own):
        raise UserError(
            f"--{name} {given[name]} means nothing to a {trained.family} run: "
            f"it has {', '.join(own)}"
        )
    return given


def choose_checkpoint(wanted: str | None) -> int | Literal["best"] | None:
    """Read --checkpoint; raises UserError where it is neither a number nor `best`."""
    if wanted is None:
        return None
    if wanted == "best":
        return "best"
    if not wanted.isdecimal():
        raise UserError(f"--checkpoint is {wanted}: give the images seen of one, or best")
    return int(wanted)


def make_images(options: Namespace, engine: Engine) -> None:
    """Sample, and write a PNG grid (a row for each class) and an `.npz`."""
    check_range(options, "--", "per_class", least=1, most=MOST_OF_A_CLASS)
    if options.out:
        check_stem("--out", Path(options.out))
    trained = open_trained(
        Path(options.run), choose_checkpoint(options.checkpoint), options.average
    )
    chosen = choose_classes(trained, options.classes)
    nets = {name: net.to(engine.device) for name, net in trained.nets.items()}
    for net in nets.values():
        use_kernels(net)
        if options.compile:
            compile_net(net)
    labels = torch.tensor(chosen).repeat_interleave(options.per_class)
    number = torch.arange(options.per_class).repeat(len(chosen))
    # So image k of a class is the same whatever else is asked for.
    index = (labels << BITS_OF_A_CLASS) + number
    knobs = choose_knobs(options, trained)
    made = sample_on_all(engine, trained.objective, nets, index, labels, options.seed, **knobs)
    if not engine.is_main:
        return
    pixels = images.to_uint8(made, trained.objective.pixels)
    default = Path(options.run) / "generated" / f"{trained.images_seen:09d}-seed{options.seed}"
    stem = Path(options.out) if options.out else default
    shown = pixels[(number < SHOWN).numpy()]
    columns = len(chosen) if options.per_class == 1 else min(options.per_class, SHOWN)
    png, npz = stem.with_name(stem.name + ".png"), stem.with_name(stem.name + ".npz")
    images.save_png(png, images.grid(shown, columns))
    by_class = trained.objective.num_classes is not None
    images.save_npz(npz, pixels, labels.numpy() if by_class else None)
    print(f"{len(pixels)} images: {png} and {npz}")


def main() -> None:
    """Make images by the command line."""
    options = parse_options(make_parser(), sys.argv[1:])
    engine = Engine("no")
    try:
        make_images(options, engine)
    finally:
        engine.close()


if __name__ == "__main__":
    run(main)
