"""Show the state of runs: `python -m slurm.status DIR [--watch]`.

A row for each run under DIR: its state in Slurm, its progress, speed and last loss, how often it
was requeued, and the last error in its log. Slurm's accounting is used if it is enabled.
"""

from __future__ import annotations

import contextlib
import math
import re
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from dgm.common.command_line import Parser, run_command
from dgm.common.errors import UserError, access_fault
from dgm.common.exit_codes import DONE, MISTAKE
from dgm.common.formatting import duration
from dgm.common.streams import reader_is_gone
from dgm.common.suggestions import nearest
from dgm.common.validation import check_range
from dgm.common.yaml_io import read_yaml
from slurm import slurm_cli
from slurm.run_state import FOLDER, RunState
from slurm.slurm_cli import State

ENDED = ("done", "failed", "cancelled", "timed out", "out of memory", "lost", "stopped", "held")
"""Final states; --only-failed resubmits runs in any of them but `done`."""

_MAX_INTERVAL_S = 86_400

_STATE_NAMES = {
    "TIMEOUT": "timed out",
    "OUT_OF_MEMORY": "out of memory",
    "CANCELLED": "cancelled",
    "COMPLETING": "running",
    "CONFIGURING": "running",
}
_COLOURS = {"done": "green", "running": "cyan", "queued": "dim", "requeued": "yellow"}
# Lines of a log with an error of the trainer, of Python, or of Slurm.
_ERROR = re.compile(r"(error: .*|\w*(Error|Exception|Interrupt)\b.*|srun: error: .*)")


@dataclass(frozen=True)
class Row:
    """A row of the table."""

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
        """Return the remaining time at the last speed, s."""
        if not self.images_per_s or self.state == "done":
            return None
        left = max(0, self.total_images - self.images_seen) / self.images_per_s
        return left if math.isfinite(left) else None


def find_runs(folder: Path) -> list[RunState]:
    """Return the runs under a folder, sorted by name."""
    folders = {path.parent.parent for path in folder.glob(f"**/{FOLDER}/job.json")}
    folders |= {path.parent for path in folder.glob("**/metrics.jsonl")}
    return [RunState(run) for run in sorted(folders)]


def rows(runs: list[RunState]) -> list[Row]:
    """Return the state of each run, with one query of Slurm for all."""
    jobs = [run.job() for run in runs]
    states = slurm_cli.states({job["job"] for job in jobs if job.get("cluster") == "slurm"})
    return [
        _row(run, job, states.get(job.get("job", ""))) for run, job in zip(runs, jobs, strict=True)
    ]


def state_of(run: RunState, job: dict[str, Any], slurm: State | None) -> str:
    """Return a run's state, from Slurm and from the history that the job has written."""
    history = _history_of(run, job)
    last = history[-1] if history else {}
    if last.get("verdict") == "done":
        return "done"
    started = bool(history)
    if slurm is not None and slurm.live:
        if slurm.held:
            return "held"
        if slurm.name in ("PENDING", "REQUEUED", "REQUEUE_HOLD"):
            return "requeued" if started else "queued"
        return _STATE_NAMES.get(slurm.name, slurm.name.lower())
    if job.get("cluster") == "local" and psutil.pid_exists(job["pid"]):
        return "running" if started else "queued"
    if last.get("event") == "end":
        return "stopped" if last["verdict"] == "stopped" else "failed"
    if slurm is not None:
        return _STATE_NAMES.get(slurm.name, "failed")
    if not job:
        return "by hand"
    # Slurm keeps no record of a task that was cancelled before it began.
    return "lost" if started or job.get("cluster") == "local" else "cancelled"


def _row(run: RunState, job: dict[str, Any], slurm: State | None) -> Row:
    metrics = run.metrics()
    last = metrics[-1] if metrics else {}
    losses = [value for key, value in last.items() if re.fullmatch(r"train/(\w+/)?loss", key)]
    history = _history_of(run, job)
    starts = [line for line in history if line["event"] == "start"]
    state = state_of(run, job, slurm)
    return Row(
        run=run.path,
        job=job.get("job", ""),
        state=state,
        images_seen=max(int(last.get("images_seen", 0)), run.images_saved(), 0),
        total_images=job.get("total_images") or _total_images(run),
        images_per_s=last.get("time/images_per_s"),
        loss=losses[0] if losses else None,
        requeues=max((_count(line, "restart") or 0 for line in starts), default=0),
        processes=_count(starts[-1], "processes") if starts else None,
        error="" if _is_healthy(state, history) else last_error(run.log),
    )


def _is_healthy(state: str, history: list[dict[str, Any]]) -> bool:
    """Return whether the last start did not fail; a requested stop leaves errors in the log too."""
    ends = [line for line in history if line["event"] == "end"]
    if not ends or (history[-1]["event"] == "start" and state in ENDED):
        return state not in ENDED
    return state == "done" or ends[-1]["verdict"] in ("done", "stopped")


def _count(line: dict[str, Any], key: str) -> int | None:
    value = line.get(key)
    return value if isinstance(value, int) and 0 <= value < 2**63 else None


def _history_of(run: RunState, job: dict[str, Any]) -> list[dict[str, Any]]:
    return [line for line in run.history() if line["submission"] == job.get("submission")]


def _total_images(run: RunState) -> int:
    try:
        return int(float(read_yaml(run.path / "config.yaml")["train"]["total_images"]))
    except (KeyError, TypeError, ValueError, OverflowError):
        return 0


def last_error(log: Path) -> str:
    """Return the last error in a log, '' if there is none near its end."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, log.stat().st_size - 100_000))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return next((line.strip() for line in reversed(text.splitlines()) if _ERROR.match(line)), "")


def table(rows: list[Row], folder: Path) -> Table:
    """Return the rows as a table."""
    result = Table(title=escape(f"runs in {folder}"), title_justify="left")
    for name in ("run", "job", "state"):
        result.add_column(name, no_wrap=True)
    for name in ("images", "of", "images/s", "loss", "left", "requeues", "processes"):
        result.add_column(name, justify="right", no_wrap=True)
    result.add_column("last error")
    for row in rows:
        name = row.run.name if row.run == folder else str(row.run.relative_to(folder))
        colour = _COLOURS.get(row.state, "red" if row.state in ENDED else "")
        result.add_row(
            escape(name),
            escape(row.job),
            f"[{colour}]{row.state}[/]" if colour else row.state,
            f"{row.images_seen:,}",
            f"{row.total_images:,}",
            "" if row.images_per_s is None else f"{row.images_per_s:,.0f}",
            "" if row.loss is None else f"{row.loss:.4f}",
            "" if row.left_s is None else duration(row.left_s),
            str(row.requeues),
            "" if row.processes is None else str(row.processes),
            escape(row.error),
        )
    return result


def _missing(folder: Path) -> UserError:
    """Return the error for a folder without runs, with the most similar name beside it."""
    if fault := access_fault(folder):
        return UserError(fault)
    if folder.is_dir():
        return UserError(f"there is no run in {folder}: name a folder that holds runs")
    parent = folder.parent
    siblings = [p.name for p in parent.iterdir() if p.is_dir()] if parent.is_dir() else []
    near = nearest(folder.name, siblings, cutoff=0.6)
    hint = f"did you mean {parent / near}?" if near else "name a folder that holds runs"
    return UserError(f"there is no folder {folder}: {hint}")


def make_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(prog="python -m slurm.status", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--watch", action="store_true", help="update until every run has ended")
    parser.add_argument("--every", type=float, default=5.0, help="seconds between two updates")
    return parser


def main() -> int:
    """Show the table, once or until every run has ended; return the exit code."""
    args = make_parser().parse_args()
    check_range(args, "--", "every", above=0, max=_MAX_INTERVAL_S)
    console = Console()
    if not console.is_terminal:
        console = Console(width=240)  # a file or a pipe takes long lines
    runs = find_runs(args.folder)
    if not runs:
        raise _missing(args.folder)
    found = rows(runs)
    if not args.watch:
        console.print(table(found, args.folder))
        faults = [fault for run in runs if (fault := run.access_fault())]
        for fault in faults:
            print(f"error: {fault}", file=sys.stderr)
        return MISTAKE if faults else DONE
    with (
        contextlib.suppress(KeyboardInterrupt),
        Live(table(found, args.folder), console=console, auto_refresh=False) as live,
    ):
        while not (reader_is_gone() or all(row.state in (*ENDED, "by hand") for row in found)):
            time.sleep(args.every)
            found = rows(find_runs(args.folder))
            live.update(table(found, args.folder), refresh=True)
    return DONE


command = partial(run_command, main)


if __name__ == "__main__":
    command()
