"""A roofline model, not a measurement, of a training step of DDPM's U-Net on a GPU.

An operation takes the maximum of its FLOPs at an effective rate, its bytes at a bandwidth, and the
minimum time of its kernels; a step takes the sum of its operations. The host's time to launch them
is reported beside it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dgm.benchmarks.costs import FP32, OUTSIDE_NET, Kind, Operation, StepCosts
from dgm.benchmarks.machine import MAX_BATCH, gflop, print_rows
from dgm.benchmarks.unet_costs import step_costs
from dgm.common.errors import UserError
from dgm.common.validation import check_range
from dgm.diffusion.unet import UNet, UNetConfig

_COPIES = 5  # fp32 numbers per parameter: weight, gradient, two moments, moving average
_WORKING_MAPS = 3  # feature maps of the largest size that a backward pass holds besides


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments; the defaults describe an H100 with 80 GB of HBM3."""
    add, config = parser.add_argument, UNetConfig()
    add("--channels", type=int, default=config.channels, help="width of the first level")
    add("--dropout", type=float, default=config.dropout)
    add("--image-size", type=int, default=32)
    add("--batch", type=int, nargs="+", default=[128, 256, 512])
    add(
        "--tflops", type=float, nargs="+", default=[430.0, 500.0, 570.0, 600.0],
        help="effective rates of convolutions and matrix products",
    )  # fmt: skip
    add("--attention-tflops", type=float, default=300.0, help="effective rate of attention")
    add("--bandwidth", type=float, default=3000.0, help="GB/s of a copy")
    add("--memory", type=float, default=80.0, help="GPU memory in GB")
    add("--usable", type=float, default=0.9, help="fraction of the memory that tensors may fill")
    add("--kernel-us", type=float, default=2.0, help="minimum time of a kernel on the GPU")
    add("--launch-us", type=float, default=5.0, help="host time to launch a kernel")
    add("--operator-us", type=float, default=75.0, help="host time to call a custom operator")


@dataclass(frozen=True)
class Machine:
    """Assumed rates of a GPU and its host."""

    tflops: float
    attention_tflops: float
    bandwidth: float
    """GB/s."""
    kernel_us: float
    launch_us: float
    operator_us: float

    def seconds(self, operation: Operation, batch: int) -> float:
        """Return the time of an operation for a batch."""
        rate = self.attention_tflops if operation.kind == Kind.ATTENTION else self.tflops
        return max(
            operation.flops * batch / (rate * 1e12),
            (operation.bytes * batch + operation.fixed_bytes) / (self.bandwidth * 1e9),
            operation.launches * self.kernel_us * 1e-6,
        )

    def step_s(self, costs: StepCosts, batch: int) -> float:
        """Return the time of a step on the GPU, one operation after the other."""
        return sum(self.seconds(operation, batch) for operation in costs.operations)

    def host_s(self, costs: StepCosts, graphs: bool = False) -> float:
        """Return the host's time to launch a step; `graphs`: two launches for the net."""
        us = 0.0
        for operation in costs.operations:
            if graphs and operation.kind not in OUTSIDE_NET:
                continue
            each = self.operator_us if operation.custom else self.launch_us
            us += operation.launches * each
        return (us + (2 * self.launch_us if graphs else 0)) * 1e-6

    def launch_bound_below(self, costs: StepCosts, graphs: bool = False) -> int:
        """Return the smallest batch whose step takes the GPU at least as long as the host."""
        host, batch = self.host_s(costs, graphs), 1
        while self.step_s(costs, batch) < host and batch < MAX_BATCH:
            batch += 1
        return batch


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Model a training step by its layers: FLOPs, bytes, launches, expected images/s."""
    _check(args)
    config = UNetConfig(channels=args.channels, dropout=args.dropout)
    with torch.device("meta"):
        net = UNet(config, args.image_size)
    forward = gflop(net, torch.device("meta"), args.image_size)
    parameters = sum(p.numel() for p in net.parameters())
    print(
        f"{parameters / 1e6:.2f} M parameters, {forward:.2f} GFLOP an image forward, "
        "counted by torch on the net"
    )
    machines = {
        rate: Machine(
            rate, args.attention_tflops, args.bandwidth,
            args.kernel_us, args.launch_us, args.operator_us,
        )
        for rate in args.tflops
    }  # fmt: skip
    middle = machines[sorted(args.tflops)[(len(args.tflops) - 1) // 2]]
    found: dict[str, Any] = {
        "settings": {k: v for k, v in vars(args).items() if k not in ("json", "command")},
        "parameters": parameters, "flops_forward": 1e9 * forward,
    }  # fmt: skip
    costs = step_costs(net, args.image_size)
    batch = max(args.batch)
    found |= {
        "by_kind": totals(costs, middle, batch, lambda o: o.kind),
        "by_layer": totals(costs, middle, batch, lambda o: f"{o.layer}: {o.kind}"),
        "memory": memory(costs, parameters, args.memory, args.usable),
        # If the GPU bounds the step.
        "images_per_s": {
            f"{rate:g}": {str(batch): batch / machine.step_s(costs, batch) for batch in args.batch}
            for rate, machine in machines.items()
        },
        "host": _host(costs, middle),
    }
    _print(found, args, f"{middle.tflops:g} TFLOP/s")
    return found


def totals(
    costs: StepCosts, machine: Machine, batch: int, key: Callable[[Operation], str]
) -> dict[str, dict[str, float]]:
    """Return totals of the operations of each key: GFLOP and MB per image, MB fixed, launches, ms.

    Keys are in the order of their kinds in `Kind`.
    """
    groups: dict[str, list[Operation]] = {}
    for operation in sorted(costs.operations, key=lambda o: [*Kind].index(o.kind)):
        groups.setdefault(key(operation), []).append(operation)
    return {
        name: {
            "gflop": sum(o.flops for o in operations) / 1e9,
            "mb": sum(o.bytes for o in operations) / 1e6,
            "fixed_mb": sum(o.fixed_bytes for o in operations) / 1e6,
            "launches": sum(o.launches for o in operations),
            "ms": 1e3 * sum(machine.seconds(o, batch) for o in operations),
        }
        for name, operations in groups.items()
    }


def memory(costs: StepCosts, parameters: int, gb: float, usable: float) -> dict[str, float]:
    """Return the memory of the backward pass per image, MB, and the largest batch in `gb`."""
    fixed = parameters * (_COPIES * FP32 + 2)  # and the weights in bf16
    each = costs.kept_bytes + _WORKING_MAPS * costs.largest_bytes
    return {
        "kept_mb": costs.kept_bytes / 1e6,
        "working_mb": _WORKING_MAPS * costs.largest_bytes / 1e6,
        "fixed_mb": fixed / 1e6,
        "largest_batch": max(0, int((usable * gb * 1e9 - fixed) / each)),
    }


def _host(costs: StepCosts, machine: Machine) -> dict[str, float]:
    return {
        "launches": sum(o.launches for o in costs.operations),
        "launches_outside_net": sum(o.launches for o in costs.operations if o.kind in OUTSIDE_NET),
        "host_ms": 1e3 * machine.host_s(costs),
        "host_ms_with_graphs": 1e3 * machine.host_s(costs, graphs=True),
        "launch_bound_below": machine.launch_bound_below(costs),
        "launch_bound_below_with_graphs": machine.launch_bound_below(costs, graphs=True),
    }


def _print(found: dict[str, Any], args: argparse.Namespace, rate: str) -> None:
    columns = {
        "GFLOP/img": ".3f", "MB/img": ".3f", "MB fixed": ".1f", "launches": ".0f", "ms": ".3f",
        "%": ".1f",
    }  # fmt: skip
    kinds = {kind: [*row.values()] for kind, row in found["by_kind"].items()}
    kinds["all"] = [sum(column) for column in zip(*kinds.values(), strict=True)]
    rows = {kind: [*row, 100 * row[-1] / kinds["all"][-1]] for kind, row in kinds.items()}
    print_rows(f"batch {max(args.batch)}, {rate}", columns, rows)
    columns = {str(batch): ",.0f" for batch in args.batch}
    rows = {
        f"products at {name} TFLOP/s": [*rates.values()]
        for name, rates in found["images_per_s"].items()
    }
    print_rows("images/s at batch", columns, rows)
    columns = {
        "MB kept/img": ".2f", "MB working/img": ".2f", "MB fixed": ".0f", "largest batch": ",.0f"
    }  # fmt: skip
    title = f"{100 * args.usable:g} % of {args.memory:g} GB"
    print_rows("memory", columns, {title: [*found["memory"].values()]})
    columns = {
        "launches": ".0f", "outside the net": ".0f", "host ms": ".2f", "with graphs": ".2f",
        "bound below batch": ".0f", "below batch with graphs": ".0f",
    }  # fmt: skip
    print_rows("host", columns, {rate: [*found["host"].values()]})


def _check(args: argparse.Namespace) -> None:
    check_range(args, "--", "batch", min=1, max=MAX_BATCH)
    check_range(
        args, "--", "tflops", "attention-tflops", "bandwidth", "memory", "launch-us",
        "operator-us", above=0,
    )  # fmt: skip
    check_range(args, "--", "kernel-us", min=0)
    check_range(args, "--", "image-size", min=8, max=1024)
    check_range(args, "--", "channels", min=4, max=8192)
    if args.channels % 4:
        raise UserError(f"--channels is {args.channels}: choose a multiple of 4")
    if args.image_size % 8:
        raise UserError(f"--image-size is {args.image_size}: choose a multiple of 8")
    if not 0 <= args.dropout < 1:
        raise UserError(f"--dropout is {args.dropout}: choose 0 or more, less than 1")
    check_range(args, "--", "usable", above=0, max=1)
