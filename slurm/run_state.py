"""Slurm's part of a run folder, `slurm/`: job.json, history.jsonl, config.yaml, log.txt."""

from __future__ import annotations

import contextlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgm.common.atomic_io import append, write_whole
from dgm.common.errors import UserError, access_fault
from dgm.common.json_files import as_object, read_objects
from dgm.common.run_files import newest_saved, read_metrics

FOLDER = "slurm"
_HISTORY_FIELDS: dict[str, dict[str, type]] = {
    "start": {"submission": str},
    "end": {"submission": str, "verdict": str},
}


@dataclass(frozen=True)
class RunState:
    """The state of a run on a cluster, kept in its run folder."""

    path: Path

    @property
    def folder(self) -> Path:
        """Return the folder of the state's files, in the run folder."""
        return self.path / FOLDER

    @property
    def log(self) -> Path:
        """Return the log file of all processes of all starts."""
        return self.folder / "log.txt"

    def images_saved(self) -> int:
        """Return the images seen at the newest checkpoint; -1 if there is none or no access."""
        with contextlib.suppress(UserError):  # no access
            return newest_saved(self.path) or -1
        return -1

    def access_fault(self) -> str | None:
        """Return the first file of the run that this user may not read, with the remedy."""
        inside = ("config.yaml", "metrics.jsonl", "checkpoints", FOLDER)
        files = ("job.json", "history.jsonl", "log.txt")
        paths = (*(self.path / name for name in inside), *(self.folder / name for name in files))
        return next((fault for path in paths if (fault := access_fault(path))), None)

    def write_job(self, job: dict[str, Any]) -> None:
        """Record the job that was submitted last."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.folder / "job.json", json.dumps(job, indent=1) + "\n")

    def job(self) -> dict[str, Any]:
        """Return the job that was submitted last; empty if there is none or its file is damaged."""
        try:
            job = as_object((self.folder / "job.json").read_bytes()) or {}
        except OSError:
            return {}
        fields: dict[str, type] = {"job": str, "cluster": str}
        if "pid" in job or job.get("cluster") == "local":
            fields["pid"] = int
        if "total_images" in job:
            fields["total_images"] = int
        return job if _has_fields(job, fields) and 0 <= job.get("pid", 0) < 2**31 else {}

    def add_event(self, event: str, **fields: Any) -> None:
        """Append a line to the history."""
        line = {"time": round(time.time(), 3), "event": event, **fields}
        with open(self.folder / "history.jsonl", "ab", buffering=0) as file:
            append(file, json.dumps(line))
            os.fsync(file.fileno())

    def history(self) -> list[dict[str, Any]]:
        """Return all starts and ends, without damaged lines."""
        lines = read_objects(self.folder / "history.jsonl")
        fields = [_HISTORY_FIELDS.get(str(line.get("event"))) for line in lines]
        return [line for line, f in zip(lines, fields, strict=True) if f and _has_fields(line, f)]

    def metrics(self) -> list[dict[str, Any]]:
        """Return the logged metrics, without damaged lines."""
        with contextlib.suppress(OSError):  # no access
            return read_metrics(self.path / "metrics.jsonl")
        return []

    def failures_in_a_row(self, submission: str) -> int:
        """Count the last starts of a submission that failed without a new checkpoint."""
        count = 0
        for line in self.history():
            if line["event"] == "end" and line["submission"] == submission:
                count = count + 1 if line["verdict"] == "fault" and not line.get("progress") else 0
        return count


def _has_fields(line: dict[str, Any], fields: dict[str, type]) -> bool:
    return all(
        type(line.get(key)) is kind and (kind is not int or abs(line[key]) < 2**63)
        for key, kind in fields.items()
    )
