"""Run folders as the trainers write them, without training."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from dgm.report.read_run import Run, read_run

ENVIRONMENT = {
    "git_commit": "0123456789abcdef",
    "git_dirty": False,
    "versions": {"python": "3.11.7", "torch": "2.15.0"},
    "devices": ["x86_64 CPU, 2 cores"],
    "command": ["train_ddpm.py", "--config", "my file.yaml", "--run.dir", "runs/x"],
    "engine": "one process",
    "world_size": 1,
}


def write_run(
    folder: Path,
    losses: Sequence[float],
    saved: int | None = None,
    settings: dict[str, dict[str, Any]] | None = None,
    family: str = "diffusion",
    age_s: float = 10_000.0,
    **more: Sequence[float],
) -> Path:
    """Write a run that logs every 100 images; `more` are further metrics, with `__` for `/`."""
    total = 100 * len(losses)
    folder.mkdir(parents=True)
    config: dict[str, Any] = {
        "run": {"dir": str(folder)},
        "data": {"source": "shapes"},
        "optim": {"lr": 1e-3},
        "train": {"total_images": total},
        family: {},
    }
    for section, keys in (settings or {}).items():
        config[section] = {**config.get(section, {}), **keys}
    config[family] = config[family] or {"known": 1}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    lines = [
        {
            "step": k + 1,
            "images_seen": 100 * (k + 1),
            "wall_s": 2.0 * (k + 1),
            "train/loss": loss,
            **{key.replace("__", "/"): values[k] for key, values in more.items()},
            "time/images_per_s": 50.0,
            "time/data_wait_s": 0.1,
        }
        for k, loss in enumerate(losses)
    ]
    if lines:
        path = folder / "metrics.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        os.utime(path, (time.time() - age_s,) * 2)
    write_checkpoint(folder, total if saved is None else saved)
    (folder / "environment.json").write_text(json.dumps(ENVIRONMENT))
    return folder


def write_checkpoint(folder: Path, images_seen: int) -> None:
    """Write a checkpoint with nothing but a manifest; none for 0 images."""
    if images_seen:
        path = folder / "checkpoints" / f"{images_seen:09d}"
        path.mkdir(parents=True)
        (path / "manifest.json").write_text("{}")


def write_picture(path: Path) -> None:
    """Write a small PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 12, 3), 200, np.uint8)).save(path, "PNG")


def opened(folder: Path, name: str | None = None, family: str = "diffusion") -> Run:
    """Read a run folder as the report does."""
    return read_run(
        folder, name or folder.name, family, {"optim.lr": 2e-4, "data.source": "cifar10"}
    )
