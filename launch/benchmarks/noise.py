"""Noising a batch: the fused, counter-based pass beside the usual eager chain, in one run."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dgm.diffusion.noising import Example, Noised, Noising
from dgm.diffusion.schedule import cosine
from dgm.kernels.choice import kernels_for
from dgm.limits import check_range
from dgm.rng import Draws
from launch.benchmarks.machine import MOST_AT_ONCE, memory_bandwidth
from launch.benchmarks.table import print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("--batch", type=int, default=128, help="images per batch")
    parser.add_argument("--repetitions", type=int, default=100, help="of each, in turn")


def eager_chain(images: Tensor, alpha: Tensor, sigma: Tensor) -> Noised:
    """Do the same work the usual way: uint8 [B, C, H, W] scaled, flipped and noised by `randn`."""
    x_0 = images.float() / 127.5 - 1
    flipped = torch.rand(len(x_0), device=x_0.device) < 0.5
    x_0 = torch.where(flipped[:, None, None, None], x_0.flip(-1), x_0)
    eps = torch.randn_like(x_0)
    x_t = alpha[:, None, None, None] * x_0 + sigma[:, None, None, None] * eps
    return Noised(x_t, x_0, eps)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Compare counter-based, compiled noising with the eager chain that uses `randn_like`."""
    check_range(args, "--", "batch", least=1, most=MOST_AT_ONCE)
    check_range(args, "--", "repetitions", least=1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stored = torch.randint(0, 256, (args.batch, 32, 32, 3), dtype=torch.uint8, device=device)
    schedule = cosine(1000)
    alphas, sigmas = (part.float().to(device) for part in (schedule.alphas, schedule.sigmas))
    index = torch.arange(args.batch, device=device)
    labels = index % 10
    plain = Noising("eps", 0.1, 10, flip=True, dequantize=False, keep_x_0=True)
    fused = replace(plain, way="kernel" if kernels_for(device) == "triton" else "compiled")
    step = 0

    def ours(noising: Noising) -> Example:
        nonlocal step
        step += 1
        return noising(stored, labels, alphas, sigmas, Draws.of(0, index, step))

    def theirs(images: Tensor) -> Noised:
        t = torch.randint(0, 1000, (args.batch,), device=device)
        dropped = torch.rand(args.batch, device=device) < 0.1
        torch.where(dropped, 10, labels)
        return eager_chain(images, alphas[t], sigmas[t])

    def by_way_of_nchw() -> Noised:
        # From the same stored batch to the same layout, through the one that suits randn_like.
        x_t, x_0, eps = theirs(stored.permute(0, 3, 1, 2).contiguous())
        return Noised(x_t.contiguous(memory_format=torch.channels_last), x_0, eps)

    ways: dict[str, Callable[[], Example | Noised]] = {
        "counter-based, compiled": lambda: ours(fused),
        "counter-based, eager": lambda: ours(plain),
        "eager chain, randn_like, channels_last": lambda: theirs(stored.permute(0, 3, 1, 2)),
        "eager chain, randn_like, by way of NCHW": by_way_of_nchw,
    }
    times = _in_turn(ways, args.repetitions, device)
    medians = {name: statistics.median(found) for name, found in times.items()}
    ours_ms = medians.pop("counter-based, compiled")
    ratios = {name: median / ours_ms for name, median in medians.items()}
    print(f"batch {args.batch}, {args.repetitions} repetitions in turn, {device.type}")
    print_table("ms per batch", times, ".2f")
    for name, ratio in ratios.items():
        print(f"{name} / counter-based, compiled: {ratio:.1f}x")
    # Read once as bytes; x_t, what is predicted and x_0 written once in fp32.
    moved = stored.numel() * (1 + 3 * 4) / (ours_ms / 1e3) / 1e9
    peak = memory_bandwidth()
    print(f"{moved:.1f} GB/s moved, {100 * moved / peak:.0f} % of a copy's {peak:.1f} GB/s")
    return {"ms_per_batch": times, "ratios": ratios, "gb_per_s": moved, "copy_gb_per_s": peak}


def _in_turn(
    ways: dict[str, Callable[[], Example | Noised]], repetitions: int, device: torch.device
) -> dict[str, list[float]]:
    """Time the ways in turn, so that the machine's moods meet all of them; milliseconds."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for repetition in range(repetitions + 5):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if repetition >= 5:  # the first ones compile and warm up
                times[name].append((time.perf_counter() - start) * 1e3)
    return times
