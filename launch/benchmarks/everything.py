"""All that a machine with a GPU is asked for, in one command; on a CPU in smaller sizes.

Each part is a process of its own with a time limit, so that one that fails leaves the others their
turn; what a part printed and measured lies in the folder as PART.txt, PART.json and PART.png.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dgm.limits import check_range
from launch.places import check_folder
from shards.build import ensure

ROOT = Path(__file__).resolve().parents[2]
BENCHMARK = ROOT / "launch" / "benchmark.py"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("--out", type=Path, required=True, help="folder for all that is measured")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--shards", help="folder of train shards; default the built-in shapes'")
    parser.add_argument("--size", choices=SIZES, help="default: gpu where there is one, else cpu")
    parser.add_argument("--minutes", type=float, default=9, help="for each part, at most")
    parser.add_argument("--peers", action="store_true", help="with other people's loops")


# Width, batch, batches to try, precision, repetitions, images of the training run.
SIZES: dict[str, dict[str, Any]] = {
    "gpu": {
        "channels": 128, "batch": 512, "batches": (128, 512, 1024, 2048), "precision": "bf16",
        "rounds": 5, "steps": 20, "images": 2_000_000,
    },
    "cpu": {
        "channels": 64, "batch": 32, "batches": (16, 32), "precision": "no",
        "rounds": 5, "steps": 2, "images": 640,
    },
    "tiny": {
        "channels": 16, "batch": 4, "batches": (2, 4), "precision": "no",
        "rounds": 1, "steps": 1, "images": 64,
    },
}  # fmt: skip
Size = dict[str, Any]


def _kernels(size: Size, peers: list[str]) -> list[list[str]]:
    repetitions = str(size["rounds"] * 10)
    return [["noise", "--batch", str(size["batch"]), "--repetitions", repetitions]]


def _steps(size: Size, peers: list[str]) -> list[list[str]]:
    return [[*_step(size), "--batch", str(batch), *peers] for batch in size["batches"]]


def _ladder(size: Size, peers: list[str]) -> list[list[str]]:
    return [[*_step(size), "--batch", str(size["batch"]), "--precision", "no", "--ladder"]]


def _memory(size: Size, peers: list[str]) -> list[list[str]]:
    again = ["--options", "train.activation_checkpointing=true"]
    return [[*_step(size), "--batch", str(size["batch"]), *again]]


def _sample(size: Size, peers: list[str]) -> list[list[str]]:
    sizes = [f"--{name}={size[name]}" for name in ("channels", "batch", "precision")]
    return [["sample", *sizes, "--repetitions", str(size["rounds"]), *peers]]


def _step(size: Size) -> list[str]:
    names = ("channels", "precision", "rounds", "steps")
    return ["step", *(f"--{name}={size[name]}" for name in names)]


PARTS: dict[str, Callable[[Size, list[str]], list[list[str]]] | None] = {
    "kernels": _kernels,
    "steps": _steps,
    "ladder": _ladder,
    "memory": _memory,
    "sample": _sample,
    "train": None,  # a run of its own, below
}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measure kernels, steps, the ladder, sampling and a training run, into one folder."""
    check_range(args, "--", "minutes", above=0)
    check_folder("--out", args.out)
    size = SIZES[args.size or ("gpu" if torch.cuda.is_available() else "cpu")]
    shards = str(ensure("shapes", args.shards))
    args.out.mkdir(parents=True, exist_ok=True)
    peers = ["--peers"] if args.peers else []
    found: dict[str, Any] = {}
    for part in args.parts:
        make = PARTS[part]
        for number, words in enumerate(make(size, peers) if make else [[]]):
            name = part if number == 0 else f"{part}-{number + 1}"
            if make is None:
                command = _train(size, shards, args.out.resolve() / "run")
            else:
                command = [str(BENCHMARK), *words, "--json", str(args.out.resolve() / name)]
                command[-1] += ".json"
                if words[0] == "step":
                    picture = str(args.out.resolve() / f"{name}.png")
                    command += ["--shards", shards, "--png", picture]
            found[name] = _run(name, command, args.out, args.minutes)
    return found


def _train(size: Size, shards: str, folder: Path) -> list[str]:
    options = {
        "run.dir": folder, "data.shards": shards, "model.channels": size["channels"],
        "train.global_batch": size["batch"], "train.total_images": size["images"],
        "train.mixed_precision": size["precision"], "train.sample_every_images": 0,
        "train.log_every_images": max(size["batch"], size["images"] // 20),
        "train.save_every_images": 0, "train.samples_per_class": 4, "sample.steps": 10,
        "optim.warmup_images": size["images"] // 10, "optim.decay": "cosine",
        "train.ema_halflife_images": size["images"] // 20,
    }  # fmt: skip
    script = str(ROOT / "launch" / "train_ddpm.py")
    return [script, *(f"--{key}={value}" for key, value in options.items())]


def _run(name: str, words: list[str], out: Path, minutes: float) -> dict[str, Any]:
    start = time.perf_counter()
    path = out / f"{name}.txt"
    print(f"\n== {name}: {' '.join(Path(w).name if w[0] == '/' else w for w in words)}", flush=True)
    with path.open("w") as said:
        try:
            code = subprocess.run(
                [sys.executable, *words], cwd=ROOT, stdout=said, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, timeout=60 * minutes,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            code = None
    took = time.perf_counter() - start
    print(path.read_text().strip())
    if code is None:
        print(f"stopped after --minutes {minutes}")
    elif code:
        print(f"ended with code {code}")
    result = out / f"{name}.json"
    measured = json.loads(result.read_text()) if result.exists() and code == 0 else None
    return {"code": code, "seconds": took, "measured": measured}
