"""The same run on every engine: uninterrupted, killed and resumed, or moved between engines.

Each run is `accelerate launch` with a file of launch/configs/accelerate on the smallest
configuration of a family.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from dgm.benchmarks.machine import add_shards_argument
from dgm.benchmarks.processes import ROOT, kill_tree, run
from dgm.cli.parser import TRAINERS
from dgm.common.errors import UserError
from dgm.common.run_files import read_metrics
from shards.build import ensure

FAMILIES = tuple(TRAINERS.values())
# Name, file of launch/configs/accelerate, number of processes.
ENGINES = {
    "one": ("one process", None, 1),
    "ddp2": ("DDP on 2", "ddp", 2),
    "ddp4": ("DDP on 4", "ddp", 4),
    **{f"zero{stage}": (f"ZeRO-{stage} on 2", f"zero{stage}", 2) for stage in range(4)},
    "zero2_offload": ("ZeRO-2 on 2, offload", "zero2_offload", 2),
    "zero3_offload": ("ZeRO-3 on 2, offload", "zero3_offload", 2),
    "zero1on4": ("ZeRO-1 on 4", "zero1", 4),
}
MOVES = ("one", "ddp2", "zero3", "zero1on4", "one")
BATCH = 16  # global batch of the smallest configurations


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add = parser.add_argument
    add("--families", nargs="+", choices=FAMILIES, default=FAMILIES)
    default = ("one", "ddp2", "ddp4", "zero0", "zero1", "zero2", "zero3")
    add("--engines", nargs="+", choices=ENGINES, default=default)
    add("--parts", nargs="+", choices=PARTS, default=tuple(PARTS))
    add("--steps", type=int, default=50, help="training steps of each run")
    add_shards_argument(parser)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Compare losses on one process, DDP and DeepSpeed ZeRO, also killed and moved between them."""
    if args.steps < 10:
        raise UserError(f"--steps is {args.steps}: choose 10 or more")
    shards = str(ensure("shapes", args.shards))
    titles = {name: title for name, (title, _, _) in ENGINES.items()}
    titles["moved"] = ", ".join(titles[name] for name in MOVES)
    others = [name for name in args.engines if name != "one"]
    rows = {"losses": others, "resume": args.engines, "moves": ["moved"]}
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="engines-") as folder:
        for part in args.parts:
            title, compare = PARTS[part]
            print(f"\n{title}\n\n| engine | {' | '.join(args.families)} |")
            print(f"|---|{'---|' * len(args.families)}", flush=True)
            found[part] = {}
            for engine in rows[part]:
                runs = [Runs(Path(folder), shards, args.steps, f) for f in args.families]
                cells = {run.family: compare(run, engine) for run in runs}
                found[part][titles[engine]] = cells
                print(
                    f"| {titles[engine]} | {' | '.join(map(_format, cells.values()))} |", flush=True
                )
    return found


@dataclass(frozen=True)
class Runs:
    """Runs of a family, each in a folder of its own."""

    folder: Path
    shards: str
    steps: int
    family: str

    def compare_whole(self, engine: str) -> float:
        """Return the largest relative difference of a loss from that on one process."""
        return _loss_difference(self.whole(engine), self.whole("one"))

    def compare_killed(self, engine: str) -> float:
        """Return the largest relative difference of a weight from that of the uninterrupted run.

        The run is killed halfway and resumed.
        """
        folder = self.path(f"killed-{engine}")
        self.kill(folder, engine, self.steps // 2)
        self.train(folder, engine)
        return _weight_difference(self, folder, self.whole(engine))

    def compare_moved(self, _: str) -> float:
        """Return the same as `compare_whole`, for a run that is moved between engines."""
        folder = self.path("moved")
        for number, name in enumerate(MOVES, 1):
            self.train(folder, name, steps=self.steps * number // len(MOVES))
        return _loss_difference(folder, self.whole("one"))

    def path(self, name: str) -> Path:
        """Return the path of a run folder."""
        return self.folder / f"{self.family}-{name}"

    def whole(self, engine: str) -> Path:
        """Return the folder of a run without interruption, trained once."""
        folder = self.path(f"whole-{engine}")
        if not folder.exists():
            self.train(folder, engine)
        return folder

    def train(self, folder: Path, engine: str, steps: int | None = None) -> None:
        """Train up to `steps`."""
        run(self._words(folder, engine, steps or self.steps))

    def kill(self, folder: Path, engine: str, lines: int) -> None:
        """Train, and kill the launcher and its workers when the log has `lines` lines."""
        log = folder / "metrics.jsonl"
        words = self._words(folder, engine, self.steps)
        process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL)
        while not log.exists() or log.read_bytes().count(b"\n") < lines:
            if process.poll() is not None:
                reason = f"ended with code {process.returncode} before it could be killed"
                raise RuntimeError(f"{folder.name} {reason}: raise --steps")
            time.sleep(0.01)
        kill_tree(process)

    def _words(self, folder: Path, engine: str, steps: int) -> list[str]:
        _, config, processes = ENGINES[engine]
        return [
            *([sys.executable] if config is None else launch_words(config, processes)),
            f"launch/train_{self.family}.py", f"--config=launch/configs/{self.family}_tiny.yaml",
            f"--run.dir={folder}", f"--data.shards={self.shards}", "--run.trackers=[]",
            "--train.mixed_precision=no", f"--train.total_images={steps * BATCH}",
            f"--train.save_every_images={5 * BATCH}",
        ]  # fmt: skip


PARTS = {
    "losses": (
        "Losses: largest relative difference from one process, uninterrupted", Runs.compare_whole
    ),
    "resume": (
        "Weights: largest relative difference, killed halfway and resumed", Runs.compare_killed
    ),
    "moves": (
        "Losses: largest relative difference from one process, moved between engines",
        Runs.compare_moved,
    ),
}  # fmt: skip


def launch_words(config: str, processes: int) -> list[str]:
    """Return the command `accelerate launch` with a file of launch/configs/accelerate."""
    return [
        sys.executable, "-m", "accelerate.commands.launch",
        "--config_file", f"launch/configs/accelerate/{config}.yaml",
        "--num_processes", str(processes), "--main_process_port", "0",
    ]  # fmt: skip


def _loss_difference(run: Path, other: Path) -> float:
    """Return the largest relative difference over steps and losses."""
    ours, theirs = _losses(run), _losses(other)
    if ours.keys() != theirs.keys():
        raise RuntimeError(f"{run.name} and {other.name} have not logged the same steps")
    return max(abs(ours[key] - theirs[key]) / abs(theirs[key]) for key in ours)


def _losses(run: Path) -> dict[tuple[float, str], float]:
    return {
        (line["step"], key): value
        for line in read_metrics(run / "metrics.jsonl")
        for key, value in line.items()
        if key.startswith("train/") and key.endswith("/loss")
    }


def _weight_difference(runs: Runs, run: Path, other: Path) -> float:
    """Return the largest difference of the final weights, relative to their tensor's maximum."""
    name = f"checkpoints/{runs.steps * BATCH:09d}/model.safetensors"
    ours, theirs = load_file(run / name), load_file(other / name)
    largest = 0.0
    for key, value in theirs.items():
        if not torch.equal(ours[key], value):
            difference = (ours[key] - value).abs().max() / value.abs().max()
            largest = max(largest, float(difference)) if difference.isfinite() else math.inf
    return largest


def _format(value: float) -> str:
    return f"{value:.1e}" if value else "0, same bits"
