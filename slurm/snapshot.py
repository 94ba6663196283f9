"""A copy of the code, so that a job that waits, or is requeued, runs what was submitted."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("dgm", "shards", "launch", "slurm")


def copy_code(folder: Path) -> None:
    """Copy the packages, and note of which commit they are."""
    leave_out = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, folder / name, ignore=leave_out)
    told = ROOT / "snapshot.json"
    if told.exists():  # submitted from a copy
        shutil.copyfile(told, folder / told.name)
        return
    commit = {"git_commit": _git("rev-parse", "HEAD"), "git_dirty": bool(_git("status", "-s"))}
    (folder / told.name).write_text(json.dumps(commit) + "\n")


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *words], cwd=ROOT, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
