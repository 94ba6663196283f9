"""Noising a batch: the fused, counter-based pass beside the usual eager chain, in one run."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dgm.benchmarks.machine import (
    MOST_AT_ONCE,
    cache_bytes,
    memory_bandwidth,
    time_launches,
)
from dgm.benchmarks.table import print_table
from dgm.common.validation import check_range
from dgm.diffusion.forward_process import Example, ForwardProcess, NoisedImages
from dgm.diffusion.schedule import cosine
from dgm.nn.kernels.dispatch import kernels_for
from dgm.rng import Draws

CLASSES, TIMESTEPS, LABEL_DROP = 10, 1000, 0.1
MOST_SETS = 256  # of inputs; only tiny batches would need more


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("--batch", type=int, default=128, help="images per batch")
    parser.add_argument("--repetitions", type=int, default=100, help="of each, in turn")
    parser.add_argument(
        "--precision", choices=("no", "bf16"), default="no", help="of the noised images"
    )


@dataclass
class Inputs:
    """A stored batch, and what its noising needs; all on the device."""

    images: Tensor  # uint8 [B, 32, 32, 3]
    labels: Tensor
    alphas: Tensor
    sigmas: Tensor
    draws: Draws

    @staticmethod
    def make(batch: int, device: torch.device, step: int) -> Inputs:
        """Make random images, and the draws of one step."""
        images = torch.randint(0, 256, (batch, 32, 32, 3), dtype=torch.uint8, device=device)
        schedule = cosine(TIMESTEPS)
        alphas, sigmas = (part.float().to(device) for part in (schedule.alphas, schedule.sigmas))
        index = torch.arange(batch, device=device)
        return Inputs(images, index % CLASSES, alphas, sigmas, Draws.of(0, index, step))


Way = Callable[[Inputs], Example | NoisedImages]


def eager_chain(images: Tensor, alpha: Tensor, sigma: Tensor) -> NoisedImages:
    """Do the same work the usual way: uint8 [B, C, H, W] scaled, flipped and noised by `randn`."""
    x_0 = images.float() / 127.5 - 1
    flipped = torch.rand(len(x_0), device=x_0.device) < 0.5
    x_0 = torch.where(flipped[:, None, None, None], x_0.flip(-1), x_0)
    eps = torch.randn_like(x_0)
    x_t = alpha[:, None, None, None] * x_0 + sigma[:, None, None, None] * eps
    return NoisedImages(x_t, x_0, eps)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Compare counter-based, compiled noising with the eager chain that uses `randn_like`."""
    check_range(args, "--", "batch", min=1, max=MOST_AT_ONCE)
    check_range(args, "--", "repetitions", min=1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    ways = _ways(dtype, device)
    times = _in_turn(ways, args.batch, args.repetitions, device)
    medians = {name: statistics.median(found) for name, found in times.items()}
    ours_ms = medians.pop("counter-based, compiled")
    ratios = {name: median / ours_ms for name, median in medians.items()}
    print(f"batch {args.batch}, {args.repetitions} repetitions in turn, {device.type}")
    print_table("ms per batch", times, ".3f" if device.type == "cuda" else ".2f")
    for name, ratio in ratios.items():
        print(f"{name} / counter-based, compiled: {ratio:.1f}x")
    bandwidth = _bandwidth(ways["counter-based, compiled"], args.batch, ours_ms, device)
    print(
        f"batch {bandwidth['batch']}: {bandwidth['gb_per_s']:.1f} GB/s moved, "
        f"{100 * bandwidth['gb_per_s'] / bandwidth['copy_gb_per_s']:.0f} % of a copy's "
        f"{bandwidth['copy_gb_per_s']:.1f} GB/s"
    )
    return {"ms_per_batch": times, "ratios": ratios, **bandwidth}


def _ways(dtype: torch.dtype, device: torch.device) -> dict[str, Way]:
    plain = ForwardProcess("eps", LABEL_DROP, CLASSES, flip=True, dequantize=False, keep_x_0=True)
    fused = replace(plain, backend="kernel" if kernels_for(device) == "triton" else "compiled")

    def ours(noising: ForwardProcess) -> Way:
        return lambda given: noising(
            given.images, given.labels, given.alphas, given.sigmas, given.draws, dtype
        )

    def theirs(given: Inputs, images: Tensor) -> NoisedImages:
        t = torch.randint(0, TIMESTEPS, (len(images),), device=images.device)
        dropped = torch.rand(len(images), device=images.device) < LABEL_DROP
        torch.where(dropped, CLASSES, given.labels)
        return eager_chain(images, given.alphas[t], given.sigmas[t])

    def by_way_of_nchw(given: Inputs) -> NoisedImages:
        # From the same stored batch to the same layout, through the one that suits randn_like.
        x_t, x_0, eps = theirs(given, given.images.permute(0, 3, 1, 2).contiguous())
        return NoisedImages(x_t.contiguous(memory_format=torch.channels_last), x_0, eps)

    return {
        "counter-based, compiled": ours(fused),
        "counter-based, eager": ours(plain),
        "eager chain, randn_like, channels_last": lambda given: theirs(
            given, given.images.permute(0, 3, 1, 2)
        ),
        "eager chain, randn_like, by way of NCHW": by_way_of_nchw,
    }


def _in_turn(
    ways: dict[str, Way], batch: int, repetitions: int, device: torch.device
) -> dict[str, list[float]]:
    """Return ms per batch of each way, timed in turns, so that load affects all of them alike.

    On a GPU by events around many launches of each.
    """
    inputs = [Inputs.make(batch, device, step) for step in range(_sets(batch, device))]
    times: dict[str, list[float]] = {name: [] for name in ways}
    if device.type == "cuda":
        for way in ways.values():
            time_launches(way, inputs, len(inputs))  # compiles and allocates
        for _ in range(5):
            for name, way in ways.items():
                times[name].append(1e3 * time_launches(way, inputs, max(2, repetitions // 5)))
        return times
    for repetition in range(repetitions + 5):
        for name, way in ways.items():
            start = time.perf_counter()
            way(inputs[repetition % len(inputs)])
            if repetition >= 5:  # the first ones compile and warm up
                times[name].append((time.perf_counter() - start) * 1e3)
    return times


def _sets(batch: int, device: torch.device) -> int:
    """Return how many batches exceed the GPU's cache together, so that none is read from it."""
    if device.type == "cpu":
        return 2
    return min(MOST_SETS, 2 + 2 * cache_bytes() // (batch * 32 * 32 * 3))


def _bandwidth(way: Way, batch: int, ms: float, device: torch.device) -> dict[str, Any]:
    """Compare the bytes moved in a second with a copy's.

    On a GPU with a batch whose images alone overflow the cache, so that neither the cache nor what
    a launch costs the host shows.
    """
    if device.type == "cuda":
        batch = max(batch, 4 * cache_bytes() // (32 * 32 * 3))
        inputs = [Inputs.make(batch, device, step) for step in range(2)]
        ms = min(1e3 * time_launches(way, inputs, 20) for _ in range(3))
        moved = moved_bytes(inputs[0], way(inputs[0]))
    else:
        given = Inputs.make(batch, device, 0)
        moved = moved_bytes(given, way(given))
    return {
        "batch": batch,
        "moved_bytes": moved,
        "gb_per_s": moved / (ms / 1e3) / 1e9,
        "copy_gb_per_s": memory_bandwidth(),
    }


def moved_bytes(given: Inputs, made: Example | NoisedImages) -> int:
    """Count the images read once and all that was made written once, each in its own dtype."""
    kept = [part for part in made if isinstance(part, Tensor)]
    return given.images.nbytes + given.labels.nbytes + sum(part.nbytes for part in kept)
