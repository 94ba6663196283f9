"""The run folder: its configuration and environment, and whether a run may continue in it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dgm.common.atomic_io import append, write_whole
from dgm.common.config_keys import MAY_CHANGE, PATH, flatten, marked_keys, nested
from dgm.common.errors import UserError
from dgm.common.redact import without_password
from dgm.common.run_files import read_config
from dgm.common.yaml_io import write_yaml
from dgm.training.engine import Engine
from dgm.training.launch_env import count_nodes
from dgm.training.run_lock import LOCK, RunLock

# Left by a start that was killed or is in progress, or by a Slurm job that will train here.
_BEFORE_A_RUN = {".config.yaml.tmp", LOCK, "slurm"}
_WRITTEN_AT_THE_START = (
    "config.yaml", "environment.json", "starts.jsonl", "metrics.jsonl", "tensorboard",
)  # fmt: skip


@dataclass(frozen=True)
class RunConfig:
    """The folder, the seed and the trackers of a run."""

    dir: str = field(default="runs/ddpm-cifar10", metadata={**MAY_CHANGE, **PATH})
    """Run folder; the same command again continues the run in it."""
    seed: int = 0
    """Seed of every draw and of the initial weights."""
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"], metadata=MAY_CHANGE)
    """Trackers besides metrics.jsonl, by accelerate's names: tensorboard, wandb, mlflow, aim ..."""


class RunFolder:
    """The folder of a run that is about to start.

    `open` creates or checks it and changes nothing that a run has written. `write_config` is called
    once the newest checkpoint was found to fit, so a refused start changes nothing.
    """

    def __init__(self, config: object, path: Path, lock: RunLock | None = None):
        """`config` is the whole configuration of the run; `open` acquires the lock."""
        self.config, self.path, self.lock = config, path, lock
        self._is_new = False

    def open(self) -> dict[str, list[Any]]:
        """Create the folder, or check that this configuration may continue the run in it.

        Return the keys that changed, each with its value before and now. Raise UserError if
        keys differ that must stay equal, or if another process trains there.
        """
        self._is_new = not self.path.exists()
        _make(self.path)
        if self.lock is not None:
            self.lock.take()
        return self.check()

    def check(self) -> dict[str, list[Any]]:
        """Check that this configuration may continue the run, as `open` does, writing nothing."""
        if not self._file.exists():
            return {}
        now, free = flatten(self.config), marked_keys(self.config, MAY_CHANGE)
        before = read_config(self._file)
        if "run.dir" in now.keys() - before.keys() and not self.is_trained():
            raise UserError(
                f"run.dir {self.path} holds no run: its config.yaml was not written by a trainer "
                "(it has no run.dir) and would be overwritten: choose another"
            )
        old_sections, new_sections = ({key.split(".")[0] for key in keys} for keys in (before, now))
        if old_sections - new_sections and new_sections - old_sections:
            if not self.is_trained():
                return {}
            raise UserError(
                f"run.dir {self.path} holds a run of another family, with the sections "
                f"{', '.join(sorted(old_sections - new_sections))}: use its script or another "
                "run.dir"
            )
        changed = _compare(now, before, flatten(type(self.config)()))
        fixed = {key: values for key, values in changed.items() if key not in free}
        if fixed and self.is_trained():
            raise UserError(
                f"run.dir {self.path} holds a run with another configuration "
                f"({'; '.join(_difference(key, fixed[key], key in now) for key in fixed)}): "
                "use its old values again or another run.dir"
            )
        return changed

    def write_config(self) -> None:
        """Write `config.yaml`, unless it is up to date."""
        text = as_yaml(self.config)
        if not self._file.exists() or self._file.read_text(encoding="utf-8") != text:
            write_whole(self._file, text)

    def is_trained(self) -> bool:
        """Return whether anything was trained here: a checkpoint or a line of the log."""
        log = self.path / "metrics.jsonl"
        saved = self.path / "checkpoints"
        return (saved.is_dir() and any(saved.iterdir())) or (
            log.exists() and log.stat().st_size > 0
        )

    def discard(self) -> None:
        """Remove the folder if this start has created it and nothing was trained in it."""
        if not self._is_new or self.is_trained():
            return
        for name in _WRITTEN_AT_THE_START:
            shutil.rmtree(self.path / name, ignore_errors=True)
            with contextlib.suppress(OSError):
                (self.path / name).unlink()
        if self.lock is not None:
            self.lock.release()
        with contextlib.suppress(OSError):  # it holds something else
            self.path.rmdir()

    @property
    def _file(self) -> Path:
        return self.path / "config.yaml"


def _compare(
    now: dict[str, Any], before: dict[str, Any], defaults: dict[str, Any]
) -> dict[str, list[Any]]:
    """Return the keys that differ; one that `before` lacks (an older version) had its default."""
    before = {**{key: defaults[key] for key in now if key not in before}, **before}
    keys = [key for key in {**before, **now} if key not in now or before[key] != now[key]]
    keys = [key for key in keys if key != "run.dir"]  # the folder may have been moved
    return {key: [before[key], now.get(key)] for key in keys}


def _difference(key: str, values: list[Any], known: bool) -> str:
    what = f"is {values[1]!r}" if known else "which this version does not know"
    return f"{key} was {values[0]!r}, {what}"


def _make(folder: Path) -> None:
    is_run = not folder.exists() or (folder / "config.yaml").exists()
    if not is_run and not (folder.is_dir() and set(os.listdir(folder)) <= _BEFORE_A_RUN):
        raise UserError(
            f"run.dir {folder} is not empty and holds no run (no config.yaml): choose another"
        )
    folder.mkdir(parents=True, exist_ok=True)


def as_yaml(config: object) -> str:
    """Return a whole configuration as YAML."""
    return write_yaml(nested(flatten(config)))


def record_start(
    folder: Path, engine: Engine, images_seen: int, changed: dict[str, list[Any]]
) -> None:
    """Write `environment.json` for this start and add a line to `starts.jsonl`."""
    environment = {
        **describe_machine(),
        "engine": str(engine.launch),
        "precision": engine.precision,
    }
    environment |= {"world_size": engine.world_size, "num_nodes": count_nodes()}
    write_whole(folder / "environment.json", json.dumps(environment, indent=1) + "\n")
    when = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    start = {"time": when, "images_seen": images_seen, "changed": changed, **environment}
    with open(folder / "starts.jsonl", "ab", buffering=0) as file:
        append(file, json.dumps(start))


def describe_machine() -> dict[str, object]:
    """Return versions of code and libraries, devices and command, but no environment variable."""
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
    """Return the commit of the code; the copy made for a Slurm job has it in a file."""
    snapshot = Path(__file__).parents[2] / "snapshot.json"
    if snapshot.exists():
        return json.loads(snapshot.read_text(encoding="utf-8"))
    return {
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": bool(_git("status", "--porcelain")),
    }


def _git(*words: str) -> str | None:
    folder = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", *words], cwd=folder, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
