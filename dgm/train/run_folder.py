"""The run folder: what a run was told, on what it ran, and whether it may go on."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dgm.addresses import without_password
from dgm.errors import UserError, check_readable
from dgm.files import append, write_whole
from dgm.train.engine import Engine
from dgm.train.launched import count_nodes
from dgm.train.lock import LOCK, RunLock
from dgm.yaml_file import read_yaml, write_yaml

MAY_CHANGE = {"may_change": True}
"""Field metadata of keys that do not alter what has been trained so far."""

# A start that was killed or is at it, a job that is to train here.
_BEFORE_A_RUN = {".config.yaml.tmp", LOCK, "slurm"}


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives and what makes it this run."""

    dir: str = field(default="runs/ddpm-cifar10", metadata=MAY_CHANGE)
    """Run folder; the same command again continues what is in it."""
    seed: int = 0
    """Seed of every draw and of the first weights."""
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"], metadata=MAY_CHANGE)
    """Trackers beside metrics.jsonl, by accelerate's names: tensorboard, wandb, mlflow, aim ..."""


def flatten(
    config: object, prefix: str = "", free: bool = False
) -> Iterator[tuple[str, Any, bool]]:
    """Go through (key, value, may change) of nested dataclasses."""
    for f in dataclasses.fields(config):  # type: ignore[arg-type]
        value, key = getattr(config, f.name), prefix + f.name
        may_change = free or bool(f.metadata.get("may_change"))
        if dataclasses.is_dataclass(value):
            yield from flatten(value, key + ".", may_change)
        else:
            yield key, list(value) if isinstance(value, tuple) else value, may_change


def open_run(config: object, folder: Path, lock: RunLock | None = None) -> dict[str, list[Any]]:
    """Make a run folder or check that this configuration may go on in it, holding its lock.

    Gives the keys that changed, each with its value before and now. Raises UserError that shows
    the keys that differ and may not, or that another process trains there.
    """
    _make(folder)
    if lock is not None:
        lock.take()
    now = {key: value for key, value, _ in flatten(config)}
    free = {key for key, _, may_change in flatten(config) if may_change}
    path = folder / "config.yaml"
    changed: dict[str, list[Any]] = {}
    if path.exists():
        before = read_config(path)
        theirs, ours = ({key.split(".")[0] for key in keys} for keys in (before, now))
        if theirs - ours and ours - theirs:
            raise UserError(
                f"run.dir {folder} holds a run of another family, with the sections "
                f"{', '.join(sorted(theirs - ours))}: use its script or another run.dir"
            )
        keys = [k for k in {**before, **now} if before.get(k) != now.get(k)]
        changed = {k: [before.get(k), now.get(k)] for k in keys}
        fixed = [f"{k} was {a!r}, is {b!r}" for k, (a, b) in changed.items() if k not in free]
        if fixed:
            raise UserError(
                f"run.dir {folder} holds a run with another configuration ({'; '.join(fixed)}): "
                "use these values again or another run.dir"
            )
    if changed or not path.exists():
        write_whole(path, as_yaml(config))
    return changed


def _make(folder: Path) -> None:
    is_run = not folder.exists() or (folder / "config.yaml").exists()
    if not is_run and not (folder.is_dir() and _names(folder) <= _BEFORE_A_RUN):
        raise UserError(
            f"run.dir {folder} is not empty and holds no run (no config.yaml): choose another"
        )
    folder.mkdir(parents=True, exist_ok=True)


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def as_yaml(config: object) -> str:
    """Write out a whole configuration."""
    return write_yaml(_nested({key: value for key, value, _ in flatten(config)}))


def record_start(
    folder: Path, engine: Engine, images_seen: int, changed: dict[str, list[Any]]
) -> None:
    """Write `environment.json` for this start and add a line to `starts.jsonl`."""
    environment = {**describe_machine(), "engine": engine.name, "precision": engine.precision}
    environment |= {"world_size": engine.world_size, "num_nodes": count_nodes()}
    write_whole(folder / "environment.json", json.dumps(environment, indent=1) + "\n")
    when = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    start = {"time": when, "images_seen": images_seen, "changed": changed, **environment}
    with open(folder / "starts.jsonl", "ab", buffering=0) as file:
        append(file, json.dumps(start))


def describe_machine() -> dict[str, object]:
    """Say which code, libraries and devices this is; nothing of the environment's variables."""
    names = ("torch", "torchvision", "accelerate", "webdataset", "numpy", "deepspeed")
    versions = {"python": platform.python_version()}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        **describe_code(),
        "versions": versions,
        "devices": gpus or [f"{platform.machine()} CPU, {os.cpu_count()} cores"],
        "command": [without_password(word) for word in (Path(sys.argv[0]).name, *sys.argv[1:])],
    }


def describe_code() -> dict[str, object]:
    """Say of which commit the code is; a copy that was made for a job has it written down."""
    told = Path(__file__).parents[2] / "snapshot.json"
    if told.exists():
        return json.loads(told.read_text(encoding="utf-8"))
    return {
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": bool(_git("status", "--porcelain")),
    }


def _git(*words: str) -> str | None:
    here = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", *words], cwd=here, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def read_config(path: Path) -> dict[str, Any]:
    """Read a run's config.yaml, flat; raises UserError where it cannot be read."""
    check_readable(path)
    try:
        nested = read_yaml(path)
    except UserError as error:
        raise UserError(f"{error}; or restore it, or move the run") from None
    if not nested:
        raise UserError(f"{path} is empty: restore it or move the run")
    return dict(flatten_nested(nested))


def flatten_nested(nested: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Go through (key, value) of nested dictionaries, as `flatten` does of dataclasses."""
    for key, value in nested.items():
        if isinstance(value, dict):
            yield from flatten_nested(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    root: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, last = key.split(".")
        node = root
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = value
    return root
