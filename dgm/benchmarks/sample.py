"""Speed of sampling: our sampler and diffusers' pipeline in turn, U-Nets of the same size."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

from dgm.benchmarks.machine import (
    add_size_arguments,
    check_sizes,
    device,
    medians,
    print_table,
    time_calls,
)
from dgm.benchmarks.peer_loops import check_installed, diffusers_net
from dgm.common.validation import check_range
from dgm.diffusion.objective import DiffusionConfig, DiffusionObjective, DiffusionSampleConfig
from dgm.diffusion.unet import UNet, UNetConfig
from dgm.nn.compiling import compile_net
from dgm.nn.layers import use_kernels
from dgm.rng import Draws
from dgm.training.state_dicts import in_channels_last

CLASSES = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add = parser.add_argument
    add("--peers", action="store_true", help="compare with diffusers' DDIMPipeline")
    add("--compile", action="store_true", help="time our compiled net too, even on a CPU")
    add_size_arguments(parser, batch=32)
    add("--steps", type=int, default=10, help="DDIM steps")
    add("--repetitions", type=int, default=5, help="timings per sampler, in turns")


Sampler = Callable[[int], None]
"""Sample a batch from a seed."""


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Compare sampling by DDIM: images per second."""
    check_range(args, "--", "steps", "repetitions", min=1)
    check_sizes(args)
    samplers: dict[str, Sampler] = {"ours": _ours(args, classes=False)}
    if args.compile or torch.cuda.is_available():
        samplers["ours, compiled"] = _ours(args, classes=False, compiled=True)
    samplers["ours, of a class"] = _ours(args, classes=True)
    samplers["ours, of a class, guided (both halves at once)"] = _ours(args, True, guidance=1.5)
    if args.peers:
        samplers["diffusers.DDIMPipeline"] = _diffusers(args)
    rates, failed = _time(samplers, args)
    found: dict[str, Any] = {
        "images_per_s": rates, "failed": failed, "batch": args.batch, "steps": args.steps
    }  # fmt: skip
    print(f"batch {args.batch}, {args.steps} steps, {args.precision}, {device().type}")
    print_table("images/s", rates, ".2f")
    for name, reason in failed.items():
        print(f"{name:46} failed: {reason}")
    if "diffusers.DDIMPipeline" in rates and "ours" in rates:
        rate = medians(rates)
        best = max(rate["ours"], rate.get("ours, compiled", 0))
        found["ratio"] = best / rate["diffusers.DDIMPipeline"]
        print(f"ours / diffusers.DDIMPipeline: {found['ratio']:.2f}x")
    return found


def _time(
    samplers: dict[str, Sampler], args: argparse.Namespace
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Return images/s of each sampler, and why samplers failed.

    They take turns, so that load affects all of them alike. Raise the exception if all fail.
    """
    rates: dict[str, list[float]] = {name: [] for name in samplers}
    failed: dict[str, str] = {}
    for seed in range(1 + args.repetitions):
        for name in list(rates):
            try:
                rate = args.batch / time_calls(samplers[name], [seed], 1)
                if seed > 0:  # the first one warms up
                    rates[name].append(rate)
            except Exception as error:  # any: the others are still timed
                if len(rates) == 1:
                    raise
                failed[name] = str(error).strip().splitlines()[0]
                del rates[name]
    return rates, failed


def _ours(
    args: argparse.Namespace, classes: bool, guidance: float = 1.0, compiled: bool = False
) -> Sampler:
    objective = DiffusionObjective(
        DiffusionConfig(class_conditional=classes),
        DiffusionSampleConfig(steps=args.steps, batch=args.batch),
        (32, 32, 3),
        CLASSES,
    )
    net = UNet(UNetConfig(channels=args.channels), 32, num_classes=objective.num_classes)
    net = net.to(device()).requires_grad_(False)
    in_channels_last(net)
    use_kernels(net)
    if compiled:
        compile_net(net)

    index = torch.arange(args.batch, device=device())
    labels = index % CLASSES if classes else None

    def sample(seed: int) -> None:
        draws = Draws.of(seed, index)
        with torch.autocast(device().type, torch.bfloat16, enabled=args.precision == "bf16"):
            objective.sample({"net": net}, args.batch, labels, draws, guidance=guidance)

    return sample


def _diffusers(args: argparse.Namespace) -> Sampler:
    check_installed()
    import diffusers

    # Weights stay fp32, as ours: the pipeline returns numpy arrays, which have no bf16.
    net = diffusers_net(args.channels).to(device())
    pipeline = diffusers.DDIMPipeline(net, diffusers.DDIMScheduler(num_train_timesteps=1000))
    pipeline.set_progress_bar_config(disable=True)

    def sample(seed: int) -> None:
        generator = torch.Generator(device()).manual_seed(seed)
        with torch.autocast(device().type, torch.bfloat16, enabled=args.precision == "bf16"):
            pipeline(args.batch, generator, num_inference_steps=args.steps, output_type="np")

    return sample
