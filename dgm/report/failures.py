"""Which runs of a sweep came to nothing, by what they and their jobs left behind."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from dgm.common.run_files import newest_saved, read_lines

_JOBS = "slurm"  # what jobs write beside a run, and a sweep's jobs beside its runs
_ERROR = re.compile(r"(error: .*|\w*(Error|Exception|Interrupt)\b.*|srun: error: .*)")


@dataclass(frozen=True)
class Failure:
    """A run that failed, or has nothing to go on from."""

    name: str
    reason: str
    error: str = ""  # the last one in its log


def children(folder: Path) -> list[Path]:
    """Find the run folders of a sweep, those included that failed before they held anything."""
    known = ("config.yaml", f"{_JOBS}/job.json", f"{_JOBS}/history.jsonl")
    inside = sorted(p for p in folder.iterdir() if p.is_dir() and p.name != _JOBS)
    return [p for p in inside if any((p / name).is_file() for name in known)]


def find_failure(folder: Path, name: str) -> Failure | None:
    """Say how a run of a sweep failed; None where it did not."""
    history = read_lines(folder / _JOBS / "history.jsonl")
    last = history[-1] if history else {}
    saved = newest_saved(folder)
    if last.get("event") == "end" and last.get("verdict") in ("fault", "mistake"):
        reason = f"{last['verdict']}, exit code {last.get('code')}, then {last.get('next')}"
    elif not (folder / "config.yaml").is_file():
        reason = "training never began"
    elif saved is None:
        reason = "no checkpoint"
    else:
        return None
    if saved is not None:
        reason += f", after a checkpoint at {saved:,} images"
    starts = sum(line.get("event") == "start" for line in history)
    if starts:
        reason += f", {starts} start{'s' * (starts > 1)}"
    return Failure(name, reason, _last_error(folder / _JOBS / "log.txt"))


def _last_error(log: Path) -> str:
    try:
        with open(log, "rb") as file:
            file.seek(max(0, log.stat().st_size - 100_000))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if _ERROR.match(line)), "")
