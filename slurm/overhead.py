"""Measure the time from a job's start to its first step: `python -m slurm.overhead FOLDER`.

The smallest run is submitted several times, and the time of each part of its start is printed. The
trainer without its imports is measured separately, as the second run of one process.
"""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil

from dgm.common.command_line import Parser, run_command
from dgm.common.errors import UserError
from dgm.common.validation import check_range
from slurm.run_state import RunState

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "launch" / "configs" / "ddpm_tiny.yaml"
TRAINER = ROOT / "launch" / "train_ddpm.py"
OVERRIDES = ("--run.trackers=[]", "--train.total_images=16")


def without_imports_s(folder: Path) -> float:
    """Return the time to the first step in a process that has trained before, s."""
    first, second = folder / "first", folder / "second"
    words = [str(TRAINER), "--config", str(CONFIG), *OVERRIDES]
    code = f"""
import runpy, sys, time
for folder in {[str(first), str(second)]}:
    sys.argv = {words} + ["--run.dir", folder]
    began = time.time()
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit:
        pass
print("began", began)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    began = float(done.stdout.split()[-1])
    return (second / "metrics.jsonl").stat().st_mtime - began


def clock_error_s() -> float:
    """Return by how much the kernel's process start times lie before `time.time()`, s."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    now = time.time()
    created = psutil.Process(process.pid).create_time()
    process.communicate(b"\n")
    return now - created


def find_process(text: str, variable: str = "") -> psutil.Process | None:
    """Return a process with `text` in its command line and `variable` in its environment."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            named = any(text in word for word in process.cmdline())
            if named and (not variable or variable in process.environ()):
                return process
    return None


def measure(folder: Path, cluster: str) -> dict[str, float]:
    """Submit a run; return the seconds of each part of its start."""
    words = [sys.executable, "-m", "slurm.submit", str(TRAINER), "--config", str(CONFIG)]
    words += ["--cluster", cluster, "--", f"--run.dir={folder}", *OVERRIDES]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 2:
        raise UserError(done.stderr.strip().splitlines()[-1].removeprefix("error: "))
    done.check_returncode()
    state = RunState(folder)
    batch = trainer = None
    deadline = time.monotonic() + 120
    while not state.metrics():
        if time.monotonic() > deadline:
            raise SystemExit(f"error: no step in two minutes: see {state.log}")
        batch = batch or find_process(f"{folder}/slurm/")
        trainer = trainer or (batch and find_process("train_ddpm.py", "RANK"))
        time.sleep(0.01)
    first_step = (folder / "metrics.jsonl").stat().st_mtime
    started = next(line["time"] for line in state.history() if line["event"] == "start")
    assert batch is not None and trainer is not None
    error = clock_error_s()
    return {
        "job": started - batch.create_time() - error,
        "srun": trainer.create_time() + error - started,
        "trainer": first_step - trainer.create_time() - error,
    }


def main() -> None:
    """Measure and print a table."""
    parser = Parser(prog="python -m slurm.overhead", description=__doc__)
    parser.add_argument("folder", type=Path, help="a new folder on a disk that all nodes share")
    parser.add_argument("--cluster", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    check_range(args, "--", "repeats", min=1)
    folder = args.folder.absolute()
    starts = []
    for number in range(args.repeats):
        starts.append(measure(folder / f"run-{number}", args.cluster))
        starts[-1]["trainer without imports"] = without_imports_s(folder / f"alone-{number}")
    print("| part | s, median |\n|---|---|")
    for key in starts[0]:
        print(f"| {key} | {statistics.median(start[key] for start in starts):.2f} |")
    own = [start["job"] + start["trainer without imports"] for start in starts]
    print(f"| job, and trainer without imports | {statistics.median(own):.2f} |")


if __name__ == "__main__":
    run_command(main)
