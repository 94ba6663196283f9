"""Whole training steps of DDPM's U-Net: our loop, others' loops, and a ladder of what makes ours.

Each loop is a process of its own, and they take turns, so that the machine's moods meet all of them
and each has a peak of memory of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dgm.errors import UserError
from dgm.limits import check_range
from launch import train_ddpm
from launch.benchmarks.loops import DIFFUSERS, LUCIDRAINS
from launch.benchmarks.machine import MOST_AT_ONCE, matrix_peak
from launch.benchmarks.peer_loops import check_installed
from launch.benchmarks.table import print_table
from launch.command import MISTAKE, parse
from shards.build import ensure
from shards.read import open_shards

ROOT = Path(__file__).resolve().parents[2]
NUM_PICTURES = 2000  # for loops that read files
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
    parser.add_argument("--ladder", action="store_true", help="add one thing at a time to ours")
    parser.add_argument("--channels", type=int, default=64, help="width of the first level")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each loop")
    parser.add_argument("--steps", type=int, default=4, help="of a turn")
    parser.add_argument("--options", nargs="*", default=[], help="key=value for our trainer")
    parser.add_argument("--shards", help="folder of train shards; default the built-in shapes'")
    parser.add_argument("--png", type=Path, help="file to draw the rates in")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Compare training steps: images per second, peak memory, where the time goes."""
    check_range(args, "--", "rounds", "steps", least=1)
    check_range(args, "--", "channels", "batch", least=1, most=MOST_AT_ONCE)
    for option in args.options:
        if "=" not in option:
            raise UserError(f"--options has '{option}': give key=value, as optim.lr=1e-3")
    options = [f"--{option}" for option in args.options]
    parse(train_ddpm.Config, train_ddpm.DEFAULT_CONFIG, options)  # mistakes before any work
    wanted: dict[str, dict[str, Any]] = {OURS: {"loop": OURS, "options": options}}
    if args.peers:
        check_installed()
        wanted |= {name: {"loop": name} for name in (DIFFUSERS, LUCIDRAINS)}
    if args.ladder:
        wanted = _rungs(options)
    shards = str(ensure("shapes", args.shards))
    with tempfile.TemporaryDirectory(prefix="step-") as folder:
        if args.peers:
            _write_pictures(shards, Path(folder) / "pictures")
        found = _race(wanted, args, shards, Path(folder))
    _show(found, args)
    if args.png is not None:
        _draw(found, args.png)
    return found


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


def _write_pictures(shards: str, folder: Path) -> None:
    images = open_shards(shards)
    (folder / "all").mkdir(parents=True)
    pixels = images.images(np.arange(min(NUM_PICTURES, len(images))))
    for number, picture in enumerate(pixels):
        Image.fromarray(picture).save(folder / "all" / f"{number:05d}.png")


class Contestant:
    """A loop in a process of its own."""

    def __init__(self, name: str, asked: dict[str, Any], folder: Path):
        folder.mkdir()
        self.name, self.said = name, folder / "said.txt"
        words = [sys.executable, "-m", "launch.benchmarks.loops", json.dumps(asked)]
        with self.said.open("w") as said:
            self.process = subprocess.Popen(
                words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said,
                text=True,
            )  # fmt: skip
        self.answer()

    def ask(self, **request: int) -> dict[str, Any]:
        """Let it do something and give what it tells."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """Wait for a line; raises UserError where a loop ended by a mistake of the user's."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            code, said = self.process.wait(), self.said.read_text().strip()
            if code == MISTAKE:
                raise UserError(said.splitlines()[-1].removeprefix("error: "))
            raise RuntimeError(f"the loop {self.name} ended with code {code}:\n{said[-4000:]}")
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        """End it, if it has not."""
        self.process.kill()
        self.process.communicate()


def _race(
    wanted: dict[str, dict[str, Any]], args: argparse.Namespace, shards: str, folder: Path
) -> dict[str, Any]:
    usual = {
        "batch": args.batch, "channels": args.channels, "precision": args.precision,
        "shards": shards, "pictures": str(folder / "pictures"), "warm_up": 3,
        "options": [], "undone": [],
    }  # fmt: skip
    loops: list[Contestant] = []
    try:
        for number, (name, asked) in enumerate(wanted.items()):
            own = folder / str(number)
            loops.append(Contestant(name, {**usual, **asked, "folder": str(own)}, own))
        rates: dict[str, list[float]] = {name: [] for name in wanted}
        for _ in range(args.rounds):
            for loop in loops:
                seconds = loop.ask(go=args.steps)["seconds"]
                rates[loop.name].append(args.steps * args.batch / seconds)
        found = {loop.name: {"images_per_s": rates[loop.name]} | loop.ask(tell=1) for loop in loops}
        # Last, since to look into a step takes memory.
        last = loops[-1 if args.ladder else 0]
        parts = {} if torch.cuda.is_available() else last.ask(parts=8)
        profile = last.ask(profile=3)
    finally:
        for loop in loops:
            loop.close()
    return {
        "loops": found, "parts": parts, "profile": profile,
        "batch": args.batch, "precision": args.precision,
    }  # fmt: skip


def _show(found: dict[str, Any], args: argparse.Namespace) -> None:
    loops = found["loops"]
    print_table(
        f"images/s, batch {args.batch}, {args.precision}",
        {name: loop["images_per_s"] for name, loop in loops.items()},
        ".1f",
    )
    first = next(iter(loops.values()))
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    peak = matrix_peak(dtype)
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
    found["peak_gflops"] = peak
    print(
        f"\nmatrix product, {dtype}: {peak:,.0f} GFLOP/s; "
        "a training step counts three forward passes, of direct convolutions"
    )
    if parts := found["parts"]:
        rest = 1 - parts["forward_backward_s"] / parts["step_s"]
        rate = parts["convolutions_alone_s"] / parts["convolutions_s"]
        print(f"our step: {100 * rest:.1f} % is neither forward nor backward pass of the net")
        print(f"convolutions: {100 * rate:.0f} % of the rate of torch's alone")
    profile = found["profile"]
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

    loops = list(found["loops"].items())[::-1]
    rates = [statistics.median(loop["images_per_s"]) for _, loop in loops]
    figure, axes = pyplot.subplots(figsize=(7, 0.6 + 0.5 * len(loops)), layout="constrained")
    bars = axes.barh([name for name, _ in loops], rates, color="#4477aa")
    axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.set_xlabel(f"training images/s, batch {found['batch']}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.12)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
