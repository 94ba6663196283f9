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
    device,
    medians,
    memory_bandwidth,
    print_table,
    time_calls,
)
from dgm.common.validation import check_range
from dgm.diffusion.forward_process import Example, ForwardProcess, NoisedImages
from dgm.diffusion.schedule import cosine
from dgm.nn.kernels.dispatch import kernels_for
from dgm.rng import Draws

CLASSES, TIMESTEPS, LABEL_DROP = 10, 1000, 0.1
MAX_INPUTS = 256  # batches; only tiny ones would need more
TURNS = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add = parser.add_argument
    add("--batch", type=int, default=128, help="images per batch")
    add("--repetitions", type=int, default=100, help="calls of each variant, in five turns")
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
    on_gpu = device().type == "cuda"
    cache_bytes = torch.cuda.get_device_properties().L2_cache_size if on_gpu else 0
    # Too many batches for any to stay in the cache.
    count = min(MAX_INPUTS, 2 + 2 * cache_bytes // (args.batch * 32 * 32 * 3))
    inputs = [make_inputs(args.batch, step) for step in range(count)]
    for variant in variants.values():
        time_calls(variant, inputs, count)  # compiles and allocates
    calls = -(-args.repetitions // TURNS)
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(TURNS):
        for name, variant in variants.items():
            times[name].append(1e3 * time_calls(variant, inputs, calls))
    ours_ms, *others_ms = medians(times).values()
    ours, *others = variants
    ratios = {name: ms / ours_ms for name, ms in zip(others, others_ms, strict=True)}
    print(f"batch {args.batch}, {args.repetitions} repetitions in turns, {device().type}")
    print_table("ms per batch", times, ".3f")
    for name, ratio in ratios.items():
        print(f"{name} / {ours}: {ratio:.1f}x")
    bandwidth = _bandwidth(variants[ours], args.batch, cache_bytes)
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


def _bandwidth(variant: Variant, batch: int, cache_bytes: int) -> dict[str, Any]:
    """Compare the bytes moved per second with a copy's.

    On a GPU with a batch whose images alone exceed the cache, which also hides launch overhead.
    """
    batch = max(batch, 4 * cache_bytes // (32 * 32 * 3))
    inputs = [make_inputs(batch, step) for step in range(2)]
    seconds = min(time_calls(variant, inputs, 20) for _ in range(3))
    moved = moved_bytes(inputs[0], variant(inputs[0]))
    return {
        "batch": batch,
        "moved_bytes": moved,
        "gb_per_s": moved / seconds / 1e9,
        "copy_gb_per_s": memory_bandwidth(),
    }


def moved_bytes(inputs: Inputs, output: Example | NoisedImages) -> int:
    """Return the bytes of images and labels read once and of all outputs written once."""
    written = sum(part.nbytes for part in output if isinstance(part, Tensor))
    return inputs.images.nbytes + inputs.labels.nbytes + written
