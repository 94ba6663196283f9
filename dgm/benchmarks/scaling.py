"""DDP on one machine: communication of a step, its overlap, and a model for more GPUs.

Each process runs our loop. A step is timed with and without averaging gradients, and an all-reduce
of as many bytes alone; the exposed communication is the difference of the first two.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from typing import Any

import psutil
import torch
import torch.distributed as dist

from dgm.benchmarks.engines import launch_words
from dgm.benchmarks.machine import (
    add_shards_argument,
    add_size_arguments,
    check_sizes,
    print_rows,
    wait,
)
from dgm.benchmarks.processes import run_json
from dgm.cli.entry import run
from dgm.common.errors import UserError
from dgm.common.validation import check_range
from shards.build import ensure

MAX_PROCESSES = 256  # on one machine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add = parser.add_argument
    add("--processes", type=int, default=2)
    add_size_arguments(parser, batch=16)
    add("--rounds", type=int, default=7, help="turns of each variant")
    add("--steps", type=int, default=2, help="steps per turn")
    add_shards_argument(parser)
    add("--rate", type=float, help="images/s per GPU, for the scaling model; default: measured")
    parameters = "parameters in millions, for the scaling model; default: those of the measured net"
    add("--parameters", type=float, help=parameters)
    links = "GB/s that each of 8, 64 and 512 GPUs sends, for the scaling model"
    add("--links", type=float, nargs="+", default=[300.0, 40.0, 40.0], help=links)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measure DDP: bytes sent per step and their overlap; a model for 8, 64 and 512 GPUs."""
    check_range(args, "--", "rounds", "steps", min=1)
    check_sizes(args)
    check_range(args, "--", "processes", min=2, max=MAX_PROCESSES)
    if len(args.links) != 3 or min(args.links) <= 0:
        raise UserError(f"--links is {args.links}: give three numbers above 0")
    check_range(args, "--", "rate", "parameters", above=0)
    if torch.cuda.is_available() and torch.cuda.device_count() < args.processes:
        raise UserError(
            f"--processes is {args.processes}, but there are {torch.cuda.device_count()} GPUs: "
            "choose a smaller number"
        )
    with tempfile.TemporaryDirectory(prefix="scaling-") as folder:
        settings = {
            **vars(args), "batch": args.batch * args.processes, "folder": folder,
            "shards": str(ensure("shapes", args.shards)), "options": [], "undone": [],
        }  # fmt: skip
        command = [*launch_words("ddp", args.processes), "--module", "dgm.benchmarks.scaling"]
        found = run_json([*command, json.dumps(settings, default=str)])
    _print(found, args)
    return found


def _print(found: dict[str, Any], args: argparse.Namespace) -> None:
    count = args.processes
    ring = 2 * (count - 1) / count * found["gradient_bytes"]
    step, quiet, alone = (found[name] for name in ("step_s", "quiet_step_s", "average_s"))
    found["shows_s"] = max(0.0, step - quiet)
    found["hidden"] = max(0.0, 1 - found["shows_s"] / alone)
    print(f"{count} processes x {args.batch} images, {args.channels} channels, {args.precision}")
    print(f"gradient: {found['gradient_bytes'] / 1e6:.2f} MB; a ring sends {ring / 1e6:.2f} MB")
    if found["sent_bytes"]:
        print(f"sent over loopback by each process: {found['sent_bytes'] / 1e6:.2f} MB a step")
    print(f"a step: {1e3 * step:.1f} ms; without averaging {1e3 * quiet:.1f} ms")
    print(f"averaging alone: {1e3 * alone:.1f} ms, {100 * found['hidden']:.0f} % of it hidden")
    sent = args.parameters * 4e6 if args.parameters else found["gradient_bytes"]
    image_s = 1 / args.rate if args.rate else quiet / args.batch
    found["model"] = model(sent, image_s, args.links)
    print(f"\nmodel: {sent / 1e6:.1f} MB of gradient, {1 / image_s:,.1f} images/s of each GPU")
    columns = {"GB/s": ".0f", "sending ms": ".2f", "hidden from batch (each)": ".1f"}
    rows = {f"{row['gpus']:g} GPUs": [*row.values()][1:] for row in found["model"]}
    print_rows("model", columns, rows)


def model(gradient_bytes: float, image_s: float, links: list[float]) -> list[dict[str, float]]:
    """Return rows for 8, 64 and 512 GPUs with the batch per GPU that hides the all-reduce.

    In a ring each of n GPUs sends 2 (n - 1) / n times the gradient (Patarasuk and Yuan 2009), which
    is hidden if it takes no longer than the backward pass, two thirds of `image_s` for each image.
    """
    rows = []
    for gpus, link in zip((8, 64, 512), links, strict=True):
        sending_s = 2 * (gpus - 1) / gpus * gradient_bytes / (link * 1e9)
        row = {"gpus": gpus, "link": link, "sending_ms": 1e3 * sending_s}
        rows.append(row | {"batch_that_hides": sending_s / (image_s * 2 / 3)})
    return rows


def worker() -> None:
    """Train in one of the processes; the main one prints the results."""
    settings = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from dgm.benchmarks.loops import Ours

    loop = Ours(settings)
    steps, device = settings["steps"], loop.engine.device
    wrapped: Any = loop.engine.wrapped_nets["net"]
    forward = wrapped.forward
    size = sum(p.numel() * p.element_size() for p in loop.net.parameters())
    gradient = torch.zeros(size // 4, device=device)
    loop.train(3)

    def timed(work: Any) -> float:
        dist.barrier()
        wait()
        start = time.perf_counter()
        work()
        wait()
        return time.perf_counter() - start

    def quiet() -> None:
        wrapped.forward = lambda loss, sync: forward(loss, False)
        loop.train(steps)
        wrapped.forward = forward

    times: dict[str, list[float]] = {"step_s": [], "quiet_step_s": [], "average_s": []}
    sent = []
    for _ in range(settings["rounds"]):
        before = _sent()
        times["step_s"].append(timed(lambda: loop.train(steps)) / steps)
        sent.append((_sent() - before) / steps / dist.get_world_size())
        times["quiet_step_s"].append(timed(quiet) / steps)
        times["average_s"].append(timed(lambda: dist.all_reduce(gradient)))
    found = {name: statistics.median(seconds) for name, seconds in times.items()}
    found |= {"gradient_bytes": size, "sent_bytes": statistics.median(sent)}
    if loop.engine.is_main:
        print(json.dumps(found), file=answers, flush=True)
    dist.barrier()
    loop.engine.close()


def _sent() -> int:
    loopback = psutil.net_io_counters(pernic=True).get("lo")
    # GPUs of one machine do not communicate over loopback.
    return 0 if torch.cuda.is_available() or loopback is None else loopback.bytes_sent


if __name__ == "__main__":
    run(worker)
