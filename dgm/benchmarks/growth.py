"""Cost of larger data sets: the same shards linked repeatedly, up to millions of images."""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from dgm.benchmarks.machine import add_shards_argument, medians, print_table
from dgm.benchmarks.processes import run_json
from dgm.common.errors import UserError
from dgm.common.validation import check_range
from shards.build import ensure
from shards.format import INDEX, ShardFile, load_index

# A process that loads batches as a trainer does, and prints its time and memory.
LOAD = """
import json, sys, time
start = time.perf_counter()
import psutil, torch
from dgm.training.sampler import BatchSampler
from shards.reader import open_shards
torch.set_num_threads(1)
folder, batch, steps = sys.argv[1], *map(int, sys.argv[2:])
device = torch.device("cpu")
imported = time.perf_counter()
batches = BatchSampler(open_shards(folder), 0, batch, None, 0, 1)
next(iter(batches.micro_batches(0, device)))
first = time.perf_counter()
def load(start):
    for step in range(steps):
        for batch_, draws in batches.micro_batches(start + step * batch, device):
            assert batch_.images.dtype == torch.uint8
before = time.perf_counter()
load(batch)
load(5 * len(batches.data) // 3)  # later in the run, across an epoch boundary
spent = time.perf_counter() - before
memory = psutil.Process().memory_full_info().uss
us = spent / (2 * steps * batch) * 1e6
print(json.dumps({"images": len(batches.data), "first_batch_s": first - imported,
                  "us_per_image": us, "private_mib": memory / 2**20}))
"""
RESULTS = {
    "first_batch_s": ("s from imports to first batch", ".3f"),
    "us_per_image": ("us per image", ".2f"),
    "private_mib": ("private MiB of the process", ".0f"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add = parser.add_argument
    add_shards_argument(parser)
    add("--images", type=int, nargs="+", default=[5_000, 50_000, 500_000, 5_000_000])
    add("--batch", type=int, default=128)
    add("--steps", type=int, default=1000)
    add("--repetitions", type=int, default=3, help="processes of each size")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Compare data sets of growing size: start-up, time per image, memory."""
    check_range(args, "--", "batch", "steps", "repetitions", min=1)
    check_range(args, "--", "images", min=1, max=10**9)
    if min(args.images) < args.batch:
        raise UserError(f"--images has {min(args.images)}: choose at least --batch {args.batch}")
    source = ensure("shapes", args.shards)
    found: dict[str, dict[str, list[float]]] = {name: {} for name in RESULTS}
    # Hard links need the same file system.
    with tempfile.TemporaryDirectory(prefix="growth-", dir=Path(source).resolve().parent) as root:
        folders = [_repeat(Path(source), Path(root) / str(count), count) for count in args.images]
        for _ in range(args.repetitions):
            for folder in folders:
                arguments = [str(folder), str(args.batch), str(args.steps)]
                result = run_json([sys.executable, "-c", LOAD, *arguments])
                for name, rows in found.items():
                    rows.setdefault(f"{result['images']:,} images", []).append(result[name])
    ratios = {}
    for name, (title, form) in RESULTS.items():
        print_table(title, found[name], form)
        middle = list(medians(found[name]).values())
        ratios[name] = middle[-1] / middle[0]
        print(f"the last {ratios[name]:.2f}x the first, {middle[-1] - middle[0]:+.3f}")
    return {**found, "last_over_first": ratios}


def _repeat(source: Path, folder: Path, count: int) -> Path:
    """Link shards under new names until they hold about `count` images."""
    index = load_index(source / INDEX)
    folder.mkdir()
    listed: list[ShardFile] = []
    total = 0
    for shard in itertools.cycle(index.shards):
        name = f"{len(listed):06d}.tar"
        os.link(source / shard.name, folder / name)
        listed.append(replace(shard, name=name))
        total += shard.count
        if total >= count:
            break
    (folder / INDEX).write_text(replace(index, shards=tuple(listed)).to_json(), encoding="utf-8")
    return folder
