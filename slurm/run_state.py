"""What a run folder holds of Slurm, in `slurm/`: job.json, history.jsonl, config.yaml, log.txt."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgm.common.atomic_io import write_whole
from dgm.common.errors import access_fault
from dgm.common.json_files import as_object, read_objects

FOLDER = "slurm"
_NONE: dict[str, type] = {"": int}
_KINDS: dict[str, dict[str, type]] = {  # of what a line of the history has
    "start": {"submission": str},
    "end": {"submission": str, "verdict": str},
}


@dataclass(frozen=True)
class Record:
    """A run folder, as its jobs see it."""

    run: Path

    @property
    def folder(self) -> Path:
        """Give the folder of what is ours."""
        return self.run / FOLDER

    @property
    def log(self) -> Path:
        """Give the file in which all processes of all starts write."""
        return self.folder / "log.txt"

    def images_saved(self) -> int:
        """Say how many images the newest checkpoint has seen; -1 where there is none."""
        folder = self.run / "checkpoints"
        try:
            names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
        except PermissionError:
            return -1
        return max((int(name) for name in names if name.isdecimal()), default=-1)

    def access_fault(self) -> str | None:
        """Return the first file of the run that this user may not read, with the remedy."""
        inside = ("config.yaml", "metrics.jsonl", "checkpoints", FOLDER)
        files = ("job.json", "history.jsonl", "log.txt")
        paths = (*(self.run / name for name in inside), *(self.folder / name for name in files))
        return next((fault for path in paths if (fault := access_fault(path))), None)

    def write_job(self, job: dict[str, Any]) -> None:
        """Note the job that was submitted last."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.folder / "job.json", json.dumps(job, indent=1) + "\n")

    def job(self) -> dict[str, Any]:
        """Give the job that was submitted last; empty where none was, or its file is damaged."""
        try:
            found = as_object((self.folder / "job.json").read_bytes()) or {}
        except OSError:
            return {}
        kinds: dict[str, type] = {"job": str, "cluster": str}
        if "pid" in found or found.get("cluster") == "local":
            kinds["pid"] = int
        if "total_images" in found:
            kinds["total_images"] = int
        good = _has(found, kinds) and 0 <= found.get("pid", 0) < 2**31
        return found if good else {}

    def add(self, event: str, **what: Any) -> None:
        """Add a line to the history."""
        line = {"time": round(time.time(), 3), "event": event, **what}
        with open(self.folder / "history.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def history(self) -> list[dict[str, Any]]:
        """Give all starts and ends; a line torn by a power cut, or damaged, is left out."""
        lines = read_objects(self.folder / "history.jsonl")
        return [line for line in lines if _has(line, _KINDS.get(str(line.get("event")), _NONE))]

    def metrics(self) -> list[dict[str, Any]]:
        """Give what the trainer logged; a line that is damaged is left out."""
        lines = read_objects(self.run / "metrics.jsonl")
        return [
            line
            for line in lines
            if _has(line, {"images_seen": int})
            and all(_is_number(value) for value in line.values())
        ]

    def fruitless(self, submission: str) -> int:
        """Count the starts of a submission that came to nothing, in a row, up to now."""
        count = 0
        for line in self.history():
            if line["event"] == "end" and line["submission"] == submission:
                count = count + 1 if line["verdict"] == "fault" and not line.get("progress") else 0
        return count


def _has(found: object, kinds: dict[str, type]) -> bool:
    """Say whether an object has values of these kinds."""
    return isinstance(found, dict) and all(
        type(found.get(key)) is kind and (kind is not int or _is_number(found[key]))
        for key, kind in kinds.items()
    )


def _is_number(value: object) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < 2**63)
