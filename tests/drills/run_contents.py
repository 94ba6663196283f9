"""Contents of a run folder, read independently of the toolkit."""

from __future__ import annotations

import filecmp
import hashlib
import json
from pathlib import Path

from safetensors.torch import load_file

TENSORS = ("model.safetensors", "ema.safetensors", "optimizer.safetensors")
_VARYING = ("wall_s", "time/", "memory/", "energy/")


def metrics(run: Path) -> list[dict[str, float]]:
    """Read metrics.jsonl without times, memory and energy."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(_VARYING)} for line in lines]


def named_checkpoints(run: Path) -> list[Path]:
    """Return the folders with the final name of a checkpoint, oldest first."""
    folder = run / "checkpoints"
    names = [p for p in folder.iterdir() if p.name.isdigit()] if folder.is_dir() else []
    return sorted(names, key=lambda path: int(path.name))


def newest_complete(run: Path) -> Path | None:
    """Return the newest complete checkpoint."""
    return next((path for path in reversed(named_checkpoints(run)) if is_intact(path)), None)


def is_intact(path: Path) -> bool:
    """Return whether all files of a checkpoint match its manifest and can be read."""
    try:
        files = json.loads((path / "manifest.json").read_text())["files"]
        for name in (*TENSORS, "state.json"):
            content = (path / name).read_bytes()
            found = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            if found != files[name]:
                return False
        for name in TENSORS:
            load_file(path / name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return True


def assert_same_tensors(run: Path, other: Path) -> None:
    """Compare weights, average and optimizer of the last checkpoints of two runs byte for byte."""
    newest = named_checkpoints(other)[-1]
    for name in TENSORS:
        ours = run / "checkpoints" / newest.name / name
        assert ours.exists(), f"{ours} is missing"
        assert filecmp.cmp(ours, newest / name, shallow=False), f"{ours}: other bytes"


def num_logged(run: Path) -> int:
    """Count the lines of the log, to which a process may be writing."""
    try:
        return len(metrics(run))
    except (OSError, ValueError):  # missing, or its last line is incomplete
        return 0
