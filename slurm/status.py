"""How runs fare: `python -m slurm.status DIR [--watch]`.

A row for each run under DIR: its state in Slurm, how far it is, its speed and last loss, how often
it was requeued, and the last error in its log. Slurm's accounting is used where there is any.
"""

from __future__ import annotations

import math
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import psutil
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from dgm.common.command_line import Parser
from dgm.common.errors import UserError, access_fault
from dgm.common.streams import STANDARD_OUTPUT, keep_streams, reader_is_gone
from dgm.common.suggestions import nearest
from dgm.common.yaml_io import read_yaml
from slurm import slurm_cli
from slurm.run_state import FOLDER, Record
from slurm.slurm_cli import State

ENDED = ("done", "failed", "cancelled", "timed out", "out of memory", "lost", "stopped", "held")
"""States that nothing leads out of by itself; all but `done` are for --only-failed."""

_LONGEST_S = 86_400

_WORDS = {
    "TIMEOUT": "timed out",
    "OUT_OF_MEMORY": "out of memory",
    "CANCELLED": "cancelled",
    "COMPLETING": "running",
    "CONFIGURING": "running",
}
_COLOURS = {"done": "green", "running": "cyan", "queued": "dim", "requeued": "yellow"}
# Of a log's lines: an error of the trainer's, Python's, or Slurm's.
_ERROR = re.compile(r"(error: .*|\w*(Error|Exception|Interrupt)\b.*|srun: error: .*)")


@dataclass(frozen=True)
class Row:
    """What is known of a run."""

    run: Path
    job: str
    state: str
    images_seen: int
    total_images: int
    images_per_s: float | None
    loss: float | None
    requeues: int
    processes: int | None
    error: str

    @property
    def left_s(self) -> float | None:
        """Estimate the time left at its last speed."""
        if not self.images_per_s or self.state == "done":
            return None
        left = max(0, self.total_images - self.images_seen) / self.images_per_s
        return left if math.isfinite(left) else None


def find_runs(folder: Path) -> list[Record]:
    """Find the runs under a folder, by name."""
    found = {path.parent.parent for path in folder.glob(f"**/{FOLDER}/job.json")}
    found |= {path.parent for path in folder.glob("**/metrics.jsonl")}
    return [Record(run) for run in sorted(found)]


def rows(records: list[Record]) -> list[Row]:
    """Look at runs, asking Slurm once for all."""
    jobs = [record.job() for record in records]
    known = slurm_cli.states({job["job"] for job in jobs if job.get("cluster") == "slurm"})
    return [
        _row(record, job, known.get(job.get("job", "")))
        for record, job in zip(records, jobs, strict=True)
    ]


def state_of(record: Record, job: dict[str, Any], slurm: State | None) -> str:
    """Name a run's state, from Slurm and from what the job itself wrote down."""
    history = _of_this_job(record, job)
    last = history[-1] if history else {}
    if last.get("verdict") == "done":
        return "done"
    started = bool(history)
    if slurm is not None and slurm.live:
        if slurm.held:
            return "held"
        if slurm.name in ("PENDING", "REQUEUED", "REQUEUE_HOLD"):
            return "requeued" if started else "queued"
        return _WORDS.get(slurm.name, slurm.name.lower())
    if job.get("cluster") == "local" and psutil.pid_exists(job["pid"]):
        return "running" if started else "queued"
    if last.get("event") == "end":
        return "stopped" if last["verdict"] == "stopped" else "failed"
    if slurm is not None:
        return _WORDS.get(slurm.name, "failed")
    if not job:
        return "by hand"
    # Of a task that was taken out of the queue before it began, Slurm remembers nothing.
    return "lost" if started or job.get("cluster") == "local" else "cancelled"


def _row(record: Record, job: dict[str, Any], slurm: State | None) -> Row:
    metrics = record.metrics()
    last = metrics[-1] if metrics else {}
    losses = [value for key, value in last.items() if re.fullmatch(r"train/(\w+/)?loss", key)]
    history = _of_this_job(record, job)
    starts = [line for line in history if line["event"] == "start"]
    state = state_of(record, job, slurm)
    return Row(
        run=record.run,
        job=job.get("job", ""),
        state=state,
        images_seen=max(int(last.get("images_seen", 0)), record.images_saved(), 0),
        total_images=job.get("total_images") or _total_images(record),
        images_per_s=last.get("time/images_per_s"),
        loss=losses[0] if losses else None,
        requeues=max((_whole(line, "restart") or 0 for line in starts), default=0),
        processes=_whole(starts[-1], "processes") if starts else None,
        error="" if _well(state, history) else last_error(record.log),
    )


def _well(state: str, history: list[dict[str, Any]]) -> bool:
    """Say whether nothing went wrong lately; processes that are told to stop leave errors too."""
    ends = [line for line in history if line["event"] == "end"]
    if not ends or (history[-1]["event"] == "start" and state in ENDED):
        return state not in ENDED
    return state == "done" or ends[-1]["verdict"] in ("done", "stopped")


def _whole(line: dict[str, Any], key: str) -> int | None:
    value = line.get(key)
    return value if isinstance(value, int) and 0 <= value < 2**63 else None


def _of_this_job(record: Record, job: dict[str, Any]) -> list[dict[str, Any]]:
    """Leave out what came before the run was submitted last."""
    return [line for line in record.history() if line["submission"] == job.get("submission")]


def _total_images(record: Record) -> int:
    """Read how long a run that was never submitted is to train."""
    try:
        return int(float(read_yaml(record.run / "config.yaml")["train"]["total_images"]))
    except (KeyError, TypeError, ValueError, OverflowError):
        return 0


def last_error(log: Path) -> str:
    """Find the last line in the end of a log that tells an error."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, log.stat().st_size - 100_000))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return next((line.strip() for line in _backwards(text) if _ERROR.match(line)), "")


def _backwards(text: str) -> Iterator[str]:
    yield from reversed(text.splitlines())


def table(found: list[Row], folder: Path) -> Table:
    """Draw the rows."""
    drawn = Table(title=escape(f"runs in {folder}"), title_justify="left")
    drawn.add_column("run", no_wrap=True)
    for name in ("job", "state"):
        drawn.add_column(name, no_wrap=True)
    for name in ("images", "of", "images/s", "loss", "left", "requeues", "processes"):
        drawn.add_column(name, justify="right", no_wrap=True)
    drawn.add_column("last error")
    for row in found:
        name = row.run.name if row.run == folder else str(row.run.relative_to(folder))
        colour = _COLOURS.get(row.state, "red" if row.state in ENDED else "")
        drawn.add_row(
            escape(name),
            escape(row.job),
            f"[{colour}]{row.state}[/]" if colour else row.state,
            f"{row.images_seen:,}",
            f"{row.total_images:,}",
            "" if row.images_per_s is None else f"{row.images_per_s:,.0f}",
            "" if row.loss is None else f"{row.loss:.4f}",
            "" if row.left_s is None else _clock(row.left_s),
            str(row.requeues),
            "" if row.processes is None else str(row.processes),
            escape(row.error),
        )
    return drawn


def _clock(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}"


def nearest_folder(missing: Path) -> Path | None:
    """Return the folder beside a missing one whose name is most like its name, if one is."""
    parent = missing.parent
    there = {p.name: p for p in parent.iterdir() if p.is_dir()} if parent.is_dir() else {}
    near = nearest(missing.name, there, cutoff=0.6)
    return there[near] if near else None


def main() -> int:
    """Show the table, once or until nothing changes any more."""
    parser = Parser(prog="python -m slurm.status", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--watch", action="store_true", help="until every run has ended")
    parser.add_argument("--every", type=float, default=5.0, help="seconds between two looks")
    asked = parser.parse_args()
    if not 0 < asked.every <= _LONGEST_S:
        parser.error(f"--every is {asked.every}: choose a number above 0, at most {_LONGEST_S}")
    console = Console()
    if not console.is_terminal:
        console = Console(width=240)  # a file or a pipe has room
    try:
        records = find_runs(asked.folder)
        if not records:
            if fault := access_fault(asked.folder):
                raise UserError(fault)
            if asked.folder.is_dir():
                raise UserError(f"there is no run in {asked.folder}: name a folder that holds runs")
            near = nearest_folder(asked.folder)
            hint = f"did you mean {near}?" if near else "name a folder that holds runs"
            raise UserError(f"there is no folder {asked.folder}: {hint}")
        found = rows(records)
        if not asked.watch:
            console.print(table(found, asked.folder))
            return _report_denied(records)
        with Live(table(found, asked.folder), console=console, auto_refresh=False) as live:
            while not (reader_is_gone() or all(row.state in (*ENDED, "by hand") for row in found)):
                time.sleep(asked.every)
                found = rows(find_runs(asked.folder))
                live.update(table(found, asked.folder), refresh=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.filename != STANDARD_OUTPUT:
            raise
        print(f"error: {STANDARD_OUTPUT}: {error.strerror}: write it elsewhere", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 0
    return 0


def _report_denied(records: list[Record]) -> int:
    """Name runs of whose files some may not be read, whose rows say less than there is."""
    faults = [fault for record in records if (fault := record.access_fault())]
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    return 2 if faults else 0


def command() -> NoReturn:
    """Run the command and exit."""
    keep_streams()
    sys.exit(main())


if __name__ == "__main__":
    command()
