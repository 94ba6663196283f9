"""What a run folder holds of Slurm, in `slurm/`: job.json, history.jsonl, config.yaml, log.txt."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = "slurm"


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
        names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
        return max((int(name) for name in names if name.isdigit()), default=-1)

    def write_job(self, job: dict[str, Any]) -> None:
        """Note the job that was submitted last."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.folder / "job.json", json.dumps(job, indent=1) + "\n")

    def job(self) -> dict[str, Any]:
        """Give the job that was submitted last; empty where none was."""
        try:
            return json.loads((self.folder / "job.json").read_text())
        except (OSError, ValueError):
            return {}

    def add(self, event: str, **what: Any) -> None:
        """Add a line to the history."""
        line = {"time": round(time.time(), 3), "event": event, **what}
        with open(self.folder / "history.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def history(self) -> list[dict[str, Any]]:
        """Give all starts and ends; a line torn by a power cut is left out."""
        return list(_lines(self.folder / "history.jsonl"))

    def metrics(self) -> list[dict[str, Any]]:
        """Give what the trainer logged."""
        return list(_lines(self.run / "metrics.jsonl"))

    def fruitless(self, submission: str) -> int:
        """Count the starts of a submission that came to nothing, in a row, up to now."""
        count = 0
        for line in self.history():
            if line["event"] == "end" and line["submission"] == submission:
                count = count + 1 if line["verdict"] == "fault" and not line["progress"] else 0
        return count


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text)
    os.replace(partial, path)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        text = path.read_text()
    except OSError:
        return
    for line in text.splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue
