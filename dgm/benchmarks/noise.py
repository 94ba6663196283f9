"""Noising a batch: the fused, counter-based pass and the usual eager operations."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dgm.benchmarks.machine import (
    MAX_BATCH,
    cache_bytes,
    device,
    medians,
    memory_bandwidth,
    print_table,
    time_in_turns,
    time_launches,
)
from dgm.common.validation import check_range
from dgm.diffusion.forward_process import Example, ForwardProcess, NoisedImages
from dgm.diffusion.schedule import cosine
from dgm.nn.kernels.dispatch import kernels_for
from dgm.rng import Draws

CLASSES, TIMESTEPS, LABEL_DROP = 10, 1000, 0.1
MAX_INPUTS = 256  # batches; only tiny ones would need more


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add = parser.add_argument
    add("--batch", type=int, default=128, help="images per batch")
    add("--repetitions", type=int, default=100, help="timings per variant, in turns")
    add("--precision", choices=("no", "bf16"), default="no", help="dtype of noised images")


class Inputs(NamedTuple):
    """A stored batch, its schedule and draws, on the device."""

    images: Tensor  # uint8 [B, 32, 32, 3]
    labels: Tensor
    alphas: Tensor
    sigmas: Tensor
    draws: Draws


def make_inputs(batch: int, step: int) -> Inputs:
    """Return random images and the draws of a step."""
    images = torch.randint(0, 256, (batch, 32, 32, 3), dtype=torch.uint8, device=device())
    schedule = cosine(TIMESTEPS)
    alphas, sigmas = (x.float().to(device()) for x in (schedule.alphas, schedule.sigmas))
    index = torch.arange(batch, device=device())
    return Inputs(images, index % CLASSES, alphas, sigmas, Draws.of(0, index, step))


Variant = Callable[[Inputs], Example | NoisedImages]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Compare counter-based, compiled noising with the eager chain that uses `randn_like`."""
    check_range(args, "--", "batch", min=1, max=MAX_BATCH)
    check_range(args, "--", "repetitions", min=1)
    variants = _variants(torch.bfloat16 if args.precision == "bf16" else torch.float32)
    times = _time_in_turns(variants, args.batch, args.repetitions)
    median_ms = medians(times)
    ours_ms = median_ms.pop("counter-based, compiled")
    ratios = {name: ms / ours_ms for name, ms in median_ms.items()}
    print(f"batch {args.batch}, {args.repetitions} repetitions in turns, {device().type}")
    print_table("ms per batch", times, ".3f" if device().type == "cuda" else ".2f")
    for name, ratio in ratios.items():
        print(f"{name} / counter-based, compiled: {ratio:.1f}x")
    bandwidth = _bandwidth(variants["counter-based, compiled"], args.batch, ours_ms)
    print(
        f"batch {bandwidth['batch']}: {bandwidth['gb_per_s']:.1f} GB/s moved, "
        f"{100 * bandwidth['gb_per_s'] / bandwidth['copy_gb_per_s']:.0f} % of a copy's "
        f"{bandwidth['copy_gb_per_s']:.1f} GB/s"
    )
    return {"ms_per_batch": times, "ratios": ratios, **bandwidth}


def _variants(dtype: torch.dtype) -> dict[str, Variant]:
    plain = ForwardProcess("eps", LABEL_DROP, CLASSES, flip=True, dequantize=False, keep_x_0=True)
    fused = replace(plain, backend="kernel" if kernels_for(device()) == "triton" else "compiled")

    def eager(x: Inputs, images: Tensor) -> NoisedImages:
        """Scale, flip and noise [B, C, H, W] by eager operations and `randn_like`."""
        t = torch.randint(0, TIMESTEPS, (len(images),), device=images.device)[:, None, None, None]
        dropped = torch.rand(len(images), device=images.device) < LABEL_DROP
        torch.where(dropped, CLASSES, x.labels)
        x_0 = images.float() / 127.5 - 1
        flipped = torch.rand(len(x_0), device=x_0.device) < 0.5
        x_0 = torch.where(flipped[:, None, None, None], x_0.flip(-1), x_0)
        eps = torch.randn_like(x_0)
        return NoisedImages(x.alphas[t] * x_0 + x.sigmas[t] * eps, x_0, eps)

    def by_way_of_nchw(x: Inputs) -> NoisedImages:
        # Input and output layouts are the same, but it computes in NCHW, which suits randn_like.
        x_t, x_0, eps = eager(x, x.images.permute(0, 3, 1, 2).contiguous())
        return NoisedImages(x_t.contiguous(memory_format=torch.channels_last), x_0, eps)

    return {
        "counter-based, compiled": lambda x: fused(*x, dtype),
        "counter-based, eager": lambda x: plain(*x, dtype),
        "eager chain, randn_like, channels_last": lambda x: eager(x, x.images.permute(0, 3, 1, 2)),
        "eager chain, randn_like, by way of NCHW": by_way_of_nchw,
    }


def _time_in_turns(
    variants: dict[str, Variant], batch: int, repetitions: int
) -> dict[str, list[float]]:
    """Return ms per batch of each variant, timed in turns, so that load affects all of them alike.

    On a GPU by events around many launches of each, with too many batches for any to stay in the
    cache.
    """
    on_gpu = device().type == "cuda"
    count = 2 + (2 * cache_bytes() // (batch * 32 * 32 * 3) if on_gpu else 0)
    inputs = [make_inputs(batch, step) for step in range(min(MAX_INPUTS, count))]
    if on_gpu:
        times: dict[str, list[float]] = {name: [] for name in variants}
        for variant in variants.values():
            time_launches(variant, inputs, len(inputs))  # compiles and allocates
        for _ in range(5):
            for name, variant in variants.items():
                times[name].append(1e3 * time_launches(variant, inputs, max(2, repetitions // 5)))
        return times

    def work(variant: Variant) -> Callable[[int], Any]:
        return lambda repetition: variant(inputs[repetition % len(inputs)])

    functions = {name: work(variant) for name, variant in variants.items()}
    seconds, failed = time_in_turns(functions, repetitions, warm_up=5)
    if failed:
        raise RuntimeError(f"failed: {failed}")
    return {name: [1e3 * each for each in values] for name, values in seconds.items()}


def _bandwidth(variant: Variant, batch: int, ms: float) -> dict[str, Any]:
    """Compare the bytes moved per second with a copy's.

    On a GPU with a batch whose images alone exceed the cache, which also hides launch overhead.
    """
    on_gpu = device().type == "cuda"
    if on_gpu:
        batch = max(batch, 4 * cache_bytes() // (32 * 32 * 3))
    inputs = [make_inputs(batch, step) for step in range(2 if on_gpu else 1)]
    if on_gpu:
        ms = min(1e3 * time_launches(variant, inputs, 20) for _ in range(3))
    moved = moved_bytes(inputs[0], variant(inputs[0]))
    return {
        "batch": batch,
        "moved_bytes": moved,
        "gb_per_s": moved / (ms / 1e3) / 1e9,
        "copy_gb_per_s": memory_bandwidth(),
    }


def moved_bytes(inputs: Inputs, output: Example | NoisedImages) -> int:
    """Return the bytes of images and labels read once and of all outputs written once."""
    written = sum(part.nbytes for part in output if isinstance(part, Tensor))
    return inputs.images.nbytes + inputs.labels.nbytes + written
