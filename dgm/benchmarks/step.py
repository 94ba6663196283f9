"""Training steps of DDPM's U-Net: our loop, peers' loops, and a ladder of our optimizations.

Each loop is a process of its own (`loop_processes`); one that fails does not stop the others.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from PIL import Image

from dgm.benchmarks.loop_processes import Plan, failures, time_loops
from dgm.benchmarks.machine import (
    add_shards_argument,
    add_size_arguments,
    check_sizes,
    matrix_peak,
    print_rows,
    print_table,
)
from dgm.benchmarks.peer_loops import PEERS, check_batch, check_installed
from dgm.cli import train_ddpm
from dgm.cli.parser import parse
from dgm.common.errors import UserError
from dgm.common.validation import check_range
from dgm.training import cuda_graph
from shards.build import ensure
from shards.reader import open_shards

MIN_PICTURES = 2000  # for loops that read files
MAX_PICTURES = 50_000
WARM_UP = cuda_graph.WARM_UP + 2  # steps before any is timed; one of them is captured
OURS = "ours"


class Rung(NamedTuple):
    """A rung of the ladder: an optimization that is added to those of the rungs before it."""

    name: str
    options: tuple[str, ...] = ()
    restored: str = ""  # an optimization that only the rungs before this one undo
    only_on_gpu: bool = False


LADDER = [
    Rung("eager, NCHW, fp32", ("compile=none", "kernels=false", "images_on_device=false")),
    Rung("channels_last", restored="channels_last"),
    Rung("fused noise", ("compile=noise",)),
    Rung("resident data", ("images_on_device=true",), only_on_gpu=True),
    Rung("bf16", ("mixed_precision=bf16",), only_on_gpu=True),
    Rung("compiled net", ("compile=all",)),
    Rung("our kernels", ("kernels=true",)),
    Rung("CUDA graphs", ("compile=graphs",), only_on_gpu=True),
    Rung("fused optimizer and EMA", restored="fused_updates"),
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add = parser.add_argument
    add("--peers", action="store_true", help="time the loops of diffusers and lucidrains too")
    add("--loops", nargs="+", choices=(OURS, *PEERS), help="loops to time; default: ours alone")
    add("--ladder", action="store_true", help="add our optimizations one by one")
    add_size_arguments(parser, batch=32)
    add("--rounds", type=int, default=5, help="turns of each loop")
    add("--steps", type=int, default=4, help="steps per turn")
    add("--options", nargs="*", default=[], help="key=value for our trainer")
    add("--seconds", type=float, help="time limit of all loops together; default: none")
    add_shards_argument(parser)
    add("--png", type=Path, help="file for a bar chart of the rates")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Compare training steps: images per second, peak memory, where the time goes."""
    check_range(args, "--", "rounds", "steps", min=1)
    check_range(args, "--", "seconds", above=0)
    deadline = _deadline(args.seconds)
    check_sizes(args)
    for option in args.options:
        if "=" not in option:
            raise UserError(f"--options has '{option}': give key=value, such as optim.lr=1e-3")
    options = [f"--{option}" for option in args.options]
    parse(train_ddpm.Config, train_ddpm.DEFAULT_CONFIG, options)  # errors before any work
    chosen = args.loops or [OURS, *(PEERS if args.peers else ())]
    has_peers = any(name in PEERS for name in chosen)
    if has_peers:
        check_installed()
        check_batch(args.batch)
    loops: dict[str, dict[str, Any]] = {name: {"loop": name, "options": options} for name in chosen}
    if args.ladder:
        loops = _rungs(options)
    shards = str(ensure("shapes", args.shards))
    profiled = list(loops)[-1] if args.ladder else OURS
    with tempfile.TemporaryDirectory(prefix="step-") as name:
        folder = Path(name)
        if has_peers:
            count = num_pictures(args.batch, WARM_UP + args.rounds * args.steps)
            _write_pictures(shards, folder / "pictures", count)
        shared = {
            "batch": args.batch, "channels": args.channels, "precision": args.precision,
            "shards": shards, "pictures": str(folder / "pictures"), "warm_up": WARM_UP,
            "undone": [],
        }  # fmt: skip
        plan = Plan(
            args.rounds, args.steps, args.batch, deadline, torch.cuda.is_available(), profiled
        )
        found = time_loops({name: shared | own for name, own in loops.items()}, plan, folder)
    found |= {"batch": args.batch, "precision": args.precision}
    _print(found, args)
    if args.png is not None:
        _draw(found, args.png)
    return found


def _deadline(seconds: float | None) -> float:
    """Return the time.monotonic() at which `seconds` have passed since the process started."""
    if seconds is None:
        return math.inf
    return time.monotonic() + seconds - (time.time() - psutil.Process().create_time())


def _rungs(options: list[str]) -> dict[str, dict[str, Any]]:
    undone = [rung.restored for rung in LADDER if rung.restored]
    own: list[str] = []
    rungs = {}
    for rung in LADDER:
        if rung.only_on_gpu and not torch.cuda.is_available():
            continue
        own += [f"--train.{option}" for option in rung.options]
        undone = [name for name in undone if name != rung.restored]
        rungs[rung.name] = {"loop": OURS, "options": [*own, *options], "undone": undone}
    return rungs


def num_pictures(batch: int, steps: int) -> int:
    """Return the number of pictures for loops that read files: whole batches, at least one.

    Enough for all steps, up to the size of CIFAR-10, so that no loader restarts its workers within
    a turn.
    """
    count = min(max(MIN_PICTURES, batch * steps), MAX_PICTURES)
    return batch * max(1, count // batch)


def _write_pictures(shards: str, folder: Path, count: int) -> None:
    images = open_shards(shards)
    (folder / "all").mkdir(parents=True)
    for number in range(count):
        (picture,) = images.images(np.array([number % len(images)]))
        Image.fromarray(picture).save(folder / "all" / f"{number:05d}.png")


def _print(found: dict[str, Any], args: argparse.Namespace) -> None:
    loops = {name: loop for name, loop in found["loops"].items() if "failed" not in loop}
    print_table(
        f"images/s, batch {args.batch}, {args.precision}",
        {name: loop["images_per_s"] for name, loop in loops.items()},
        ".1f",
    )
    first = next(iter(loops.values()))
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    peak = found["peak_gflops"] = matrix_peak(dtype)
    columns = {
        "first/it": ".2f", "fastest": ".2f", "params M": ".2f", "GFLOP/img": ".2f",
        "% peak": ".1f", "GiB": ".2f", **({"loss diff": ".1e"} if args.ladder else {}),
    }  # fmt: skip
    rows = {}
    for name, loop in loops.items():
        rate = statistics.median(loop["images_per_s"])
        loop["ratio"] = statistics.median(first["images_per_s"]) / rate
        # Of the fastest turns, as other load only slows them.
        loop["ratio_of_fastest"] = max(first["images_per_s"]) / max(loop["images_per_s"])
        loop["fraction_of_peak"] = 3 * loop["gflop"] * rate / peak
        loop["loss_apart"] = _max_relative_difference(loop["losses"], first["losses"])
        rows[name] = [
            loop["ratio"], loop["ratio_of_fastest"], loop["parameters"] / 1e6, loop["gflop"],
            100 * loop["fraction_of_peak"], loop["peak_gpu_gib"] or loop["peak_gib"],
            loop["loss_apart"],
        ][: len(columns)]  # fmt: skip
    print_rows("relative to the first", columns, rows)
    for name, reason in failures(found["loops"]):
        print(f"{name:40} failed: {reason}")
    print(
        f"\nmatrix product, {dtype}: {peak:,.0f} GFLOP/s; "
        "a training step is counted as three forward passes with direct convolutions"
    )
    _print_profile(found)


def _print_profile(found: dict[str, Any]) -> None:
    if parts := found["parts"]:
        rest = 1 - parts["forward_backward_s"] / parts["step_s"]
        rate = parts["convolutions_alone_s"] / parts["convolutions_s"]
        print(f"our step: {100 * rest:.1f} % is neither forward nor backward pass of the net")
        print(f"convolutions: {100 * rate:.0f} % of the rate of torch's convolutions alone")
    if profile := found["profile"]:
        print(f"layouts converted in a step: {profile['conversions']}")
        rows = {name[:60]: [100 * fraction] for name, fraction in profile["fractions"]}
        print_rows("operations of a step", {"%": ".1f"}, rows)


def _max_relative_difference(losses: list[float], others: list[float]) -> float:
    """Return the largest relative difference of two curves over their common steps."""
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
