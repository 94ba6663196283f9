"""A copy of the code, so that a job that waits, or is requeued, runs what was submitted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("dgm", "shards", "launch", "slurm")


def copy_code(folder: Path, commit: dict[str, Any]) -> None:
    """Copy the packages, and note of which commit they are, which the copy cannot ask git."""
    leave_out = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, folder / name, ignore=leave_out)
    (folder / "snapshot.json").write_text(json.dumps(commit) + "\n", encoding="utf-8")
