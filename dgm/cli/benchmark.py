"""Measure speed and memory: `python launch/benchmark.py data`.

Each sub-command is a module of dgm/benchmarks with `add_arguments` and `measure`, which prints a
table and returns the results for --json.
"""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path

import torch

from dgm.benchmarks import (
    data,
    engines,
    growth,
    likelihood,
    noise,
    roofline,
    sample,
    scaling,
    step,
)
from dgm.cli.path_checks import check_file
from dgm.common.command_line import Parser

COMMANDS = {
    module.__name__.rpartition(".")[2]: module
    for module in (data, noise, roofline, likelihood, engines, growth, step, sample, scaling)
}


def main() -> None:
    """Run a benchmark from the command line."""
    parser = Parser(description="Measure speed and memory of the toolkit.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        assert module.measure.__doc__ is not None, "the help text comes from the docstring"
        command = commands.add_parser(name, help=module.measure.__doc__.splitlines()[0])
        module.add_arguments(command)
        command.add_argument("--json", type=Path, help="JSON file for all results")
    args = parser.parse_args()
    for name in ("json", "png"):
        if getattr(args, name, None) is not None:
            check_file(f"--{name}", getattr(args, name))
    result = COMMANDS[args.command].measure(args)
    machine = {
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    if args.json is not None:
        args.json.write_text(
            json.dumps({"machine": machine, args.command: result}, indent=1), encoding="utf-8"
        )
