"""Whole training steps of DDPM's U-Net: our loop, others' loops, and a ladder of what makes ours.

Each loop is a process of its own (`contestants`); one that fails leaves the others their figures.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image

from dgm.benchmarks.contestants import Race, failed, run_race
from dgm.benchmarks.machine import MOST_AT_ONCE, matrix_peak
from dgm.benchmarks.peer_loops import PEERS, check_batch, check_installed
from dgm.benchmarks.table import print_table
from dgm.cli import train_ddpm
from dgm.cli.parser import parse
from dgm.common.command_line import home_path
from dgm.common.errors import UserError
from dgm.common.validation import check_range
from dgm.training import cuda_graph
from shards.build import ensure
from shards.reader import open_shards

NUM_PICTURES = 2000  # for loops that read files, at least
MOST_PICTURES = 50_000
WARM_UP = cuda_graph.WARM_UP + 2  # steps before any is timed: one of them is recorded
OURS = "ours"


@dataclass
class Rung:
    """What a step of the ladder adds to the one before."""

    name: str
    options: list[str] = field(default_factory=list)
    done: str = ""  # what is no longer undone
    only_on_gpu: bool = False


LADDER = [
    Rung(
        "eager, NCHW, fp32",
        ["--train.compile=none", "--train.kernels=false", "--train.images_on_device=false"],
    ),
    Rung("channels_last", done="channels_last"),
    Rung("fused noise", ["--train.compile=noise"]),
    Rung("resident data", ["--train.images_on_device=true"], only_on_gpu=True),
    Rung("bf16", ["--train.mixed_precision=bf16"], only_on_gpu=True),
    Rung("compiled net", ["--train.compile=all"]),
    Rung("our kernels", ["--train.kernels=true"]),
    Rung("CUDA graphs", ["--train.compile=graphs"], only_on_gpu=True),
    Rung("fused optimizer and EMA", done="fused_updates"),
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("--peers", action="store_true", help="compare with others' loops")
    parser.add_argument(
        "--loops", nargs="+", choices=(OURS, *PEERS), help="some of them; default ours alone"
    )
    parser.add_argument("--ladder", action="store_true", help="add one thing at a time to ours")
    parser.add_argument("--channels", type=int, default=64, help="width of the first level")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each loop")
    parser.add_argument("--steps", type=int, default=4, help="of a turn")
    parser.add_argument("--options", nargs="*", default=[], help="key=value for our trainer")
    parser.add_argument("--seconds", type=float, help="limit of all loops together; default none")
    parser.add_argument(
        "--shards", type=home_path, help="folder of train shards; default the built-in shapes'"
    )
    parser.add_argument("--png", type=Path, help="file to draw the rates in")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Compare training steps: images per second, peak memory, where the time goes."""
    check_range(args, "--", "rounds", "steps", min=1)
    check_range(args, "--", "seconds", above=0)
    args.deadline = _deadline(args.seconds)
    check_range(args, "--", "channels", "batch", min=1, max=MOST_AT_ONCE)
    for option in args.options:
        if "=" not in option:
            raise UserError(f"--options has '{option}': give key=value, as optim.lr=1e-3")
    options = [f"--{option}" for option in args.options]
    parse(train_ddpm.Config, train_ddpm.DEFAULT_CONFIG, options)  # mistakes before any work
    chosen = list(dict.fromkeys(args.loops or ([OURS, *PEERS] if args.peers else [OURS])))
    if peers := [name for name in chosen if name != OURS]:
        check_installed()
        check_batch(args.batch)
    wanted = {name: {"loop": name, "options": options} for name in chosen}
    if args.ladder:
        wanted = _rungs(options)
    shards = str(ensure("shapes", args.shards))
    with tempfile.TemporaryDirectory(prefix="step-") as folder:
        if peers:
            count = num_pictures(args.batch, WARM_UP + args.rounds * args.steps)
            _write_pictures(shards, Path(folder) / "pictures", count)
        found = _race(wanted, args, shards, Path(folder))
    _show(found, args)
    if args.png is not None:
        _draw(found, args.png)
    return found


def _deadline(seconds: float | None) -> float:
    """Return the end of so many seconds since the process began, by time.monotonic()."""
    if seconds is None:
        return math.inf
    return time.monotonic() + seconds - (time.time() - psutil.Process().create_time())


def _rungs(options: list[str]) -> dict[str, dict[str, Any]]:
    undone = [rung.done for rung in LADDER if rung.done]
    given: list[str] = []
    rungs = {}
    for rung in LADDER:
        if rung.only_on_gpu and not torch.cuda.is_available():
            continue
        given += rung.options
        undone = [name for name in undone if name != rung.done]
        rungs[rung.name] = {"loop": OURS, "options": [*given, *options], "undone": undone}
    return rungs


def num_pictures(batch: int, steps: int) -> int:
    """Return how many pictures loops that read files get: whole batches, at least one.

    Enough for all steps, up to a data set like CIFAR-10, so that no loader starts its workers anew
    within a turn.
    """
    asked = min(max(NUM_PICTURES, batch * steps), MOST_PICTURES)
    return batch * max(1, asked // batch)


def _write_pictures(shards: str, folder: Path, count: int) -> None:
    images = open_shards(shards)
    (folder / "all").mkdir(parents=True)
    for first in range(0, count, NUM_PICTURES):
        numbers = np.arange(first, min(first + NUM_PICTURES, count))
        pixels = images.images(numbers % len(images))
        for number, picture in zip(numbers, pixels, strict=True):
            Image.fromarray(picture).save(folder / "all" / f"{number:05d}.png")


def _race(
    wanted: dict[str, dict[str, Any]], args: argparse.Namespace, shards: str, folder: Path
) -> dict[str, Any]:
    usual = {
        "batch": args.batch, "channels": args.channels, "precision": args.precision,
        "shards": shards, "pictures": str(folder / "pictures"), "warm_up": WARM_UP,
        "options": [], "undone": [],
    }  # fmt: skip
    on_gpu = torch.cuda.is_available()
    race = Race(
        args.rounds, args.steps, args.batch, args.deadline, one_by_one=on_gpu,
        inspected=list(wanted)[-1 if args.ladder else 0], with_parts=not on_gpu,
    )  # fmt: skip
    asked = {name: {**usual, **own} for name, own in wanted.items()}
    return run_race(asked, race, folder) | {"batch": args.batch, "precision": args.precision}


def _show(found: dict[str, Any], args: argparse.Namespace) -> None:
    loops = {name: loop for name, loop in found["loops"].items() if "failed" not in loop}
    print_table(
        f"images/s, batch {args.batch}, {args.precision}",
        {name: loop["images_per_s"] for name, loop in loops.items()},
        ".1f",
    )
    first = next(iter(loops.values()))
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    peak = found["peak_gflops"] = matrix_peak(dtype)
    heads = (
        f"{'first/it':>9} {'fastest':>8} {'params M':>9} {'GFLOP/img':>9} {'% peak':>7} {'GiB':>6}"
    )
    print(f"\n{'':40} {heads}")
    for name, loop in loops.items():
        rate = statistics.median(loop["images_per_s"])
        loop["ratio"] = statistics.median(first["images_per_s"]) / rate
        # Of the fastest turns: what else a shared machine does only slows them.
        loop["ratio_of_fastest"] = max(first["images_per_s"]) / max(loop["images_per_s"])
        loop["share_of_peak"] = 3 * loop["gflop"] * rate / peak
        loop["loss_apart"] = _apart(loop["losses"], first["losses"])
        memory = loop["peak_gpu_gib"] or loop["peak_gib"]
        apart = f"   losses within {loop['loss_apart']:.1e} of the first's" if args.ladder else ""
        print(
            f"{name:40} {loop['ratio']:>9.2f} {loop['ratio_of_fastest']:>8.2f} "
            f"{loop['parameters'] / 1e6:>9.2f} {loop['gflop']:>9.2f} "
            f"{100 * loop['share_of_peak']:>7.1f} {memory:>6.2f}{apart}"
        )
    for name, reason in failed(found["loops"]):
        print(f"{name:40} failed: {reason}")
    print(
        f"\nmatrix product, {dtype}: {peak:,.0f} GFLOP/s; "
        "a training step counts three forward passes, of direct convolutions"
    )
    _show_inspected(found)


def _show_inspected(found: dict[str, Any]) -> None:
    if parts := found["parts"]:
        rest = 1 - parts["forward_backward_s"] / parts["step_s"]
        rate = parts["convolutions_alone_s"] / parts["convolutions_s"]
        print(f"our step: {100 * rest:.1f} % is neither forward nor backward pass of the net")
        print(f"convolutions: {100 * rate:.0f} % of the rate of torch's alone")
    if not (profile := found["profile"]):
        return
    print(f"layouts converted in a step: {profile['conversions']}", end="")
    if profile["synchronisations"] is not None:
        print(f"; the host waited for the GPU {profile['synchronisations']} times", end="")
    print(f"\n\n{'what a step is spent on':60} {'%':>6}")
    for name, share in profile["shares"]:
        print(f"{name[:60]:60} {100 * share:>6.1f}")


def _apart(losses: list[float], others: list[float]) -> float:
    """Give the largest relative difference of two curves over the steps that both have."""
    return max((abs(a - b) / abs(b) for a, b in zip(losses, others, strict=False)), default=0.0)


def _draw(found: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    loops = [(n, loop) for n, loop in found["loops"].items() if "failed" not in loop][::-1]
    rates = [statistics.median(loop["images_per_s"]) for _, loop in loops]
    figure, axes = pyplot.subplots(figsize=(7, 0.6 + 0.5 * len(loops)), layout="constrained")
    bars = axes.barh([name for name, _ in loops], rates, color="#4477aa")
    axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.set_xlabel(f"training images/s, batch {found['batch']}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.12)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
