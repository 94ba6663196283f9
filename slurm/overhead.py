"""How long a job takes from its start to its first step: `python -m slurm.overhead FOLDER`.

It submits the smallest run several times to the cluster that is there, and takes apart where the
time goes. The trainer without its imports is measured apart, as the second run of a process.
"""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil

from dgm.common.command_line import Parser
from dgm.common.errors import UserError
from slurm.run_state import Record

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "launch" / "configs" / "ddpm_tiny.yaml"
TRAINER = ROOT / "launch" / "train_ddpm.py"
OVERRIDES = ("--run.trackers=[]", "--train.total_images=16")


def without_imports_s(folder: Path) -> float:
    """Measure a trainer's way to its first step in a process that has trained before, s."""
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
    """Measure by how much the kernel's times of birth lie before our clock, s."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    now = time.time()
    born = psutil.Process(process.pid).create_time()
    process.communicate(b"\n")
    return now - born


def processes(text: str, variable: str = "") -> list[psutil.Process]:
    """Find processes by a part of their command line and a variable of their environment."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            named = any(text in word for word in process.cmdline())
            if named and (not variable or variable in process.environ()):
                found.append(process)
    return found


def measure(folder: Path, cluster: str) -> dict[str, float]:
    """Submit a run; give the seconds of each part of its start."""
    words = [sys.executable, "-m", "slurm.submit", str(TRAINER), "--config", str(CONFIG)]
    words += ["--cluster", cluster, "--", f"--run.dir={folder}", *OVERRIDES]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 2:
        raise UserError(done.stderr.strip().splitlines()[-1].removeprefix("error: "))
    done.check_returncode()
    record = Record(folder)
    batch = trainer = None
    until = time.monotonic() + 120
    while not record.metrics():
        if time.monotonic() > until:
            raise SystemExit(f"error: no step in two minutes: see {record.log}")
        if batch is None:
            batch = next(iter(processes(f"{folder}/slurm/")), None)
        if batch is not None and trainer is None:
            trainer = next(iter(processes("train_ddpm.py", "RANK")), None)
        time.sleep(0.01)
    first_step = (folder / "metrics.jsonl").stat().st_mtime
    started = next(line["time"] for line in record.history() if line["event"] == "start")
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
    parser.add_argument("folder", type=Path, help="a new folder that the nodes see")
    parser.add_argument("--cluster", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    asked = parser.parse_args()
    if asked.repeats < 1:
        parser.error(f"--repeats is {asked.repeats}: choose 1 or more")
    found = []
    for number in range(asked.repeats):
        found.append(measure(asked.folder.absolute() / f"run-{number}", asked.cluster))
        found[-1]["trainer without imports"] = without_imports_s(
            asked.folder.absolute() / f"alone-{number}"
        )
    median = {key: statistics.median(one[key] for one in found) for key in found[0]}
    print("| part | s, median |\n|---|---|")
    for key, value in median.items():
        print(f"| {key} | {value:.2f} |")
    own = [one["job"] + one["trainer without imports"] for one in found]
    print(f"| our own: job, and trainer without imports | {statistics.median(own):.2f} |")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
