"""Train and compare the exercises' runs: `python launch/exercises.py --data shapes`.

Each exercise is a file of launch/configs/exercises, and gets a page of its own. The same command
again continues where it was stopped.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

import torch
from jsonargparse import ArgumentParser, Namespace

from dgm.cli.assemble import DataConfig
from dgm.cli.exercise_plan import FOLDER, Plan, PlannedRun, names_of_exercises, read_plan
from dgm.cli.parser import (
    TRAINERS,
    family_module,
    make_options_parser,
    parse,
    parse_options,
    path_word,
)
from dgm.cli.path_checks import check_folder
from dgm.cli.report import open_run
from dgm.common.atomic_io import write_whole
from dgm.common.errors import UserError
from dgm.common.exit_codes import FAULT, MISTAKE, STOPPED
from dgm.common.formatting import duration
from dgm.common.run_files import newest_saved, read_lines
from dgm.common.validation import check_range
from dgm.report.exercise import exercise_page
from dgm.report.read_run import Run
from dgm.report.tables import as_text
from dgm.training.stop_request import watched_signals
from shards.build import ensure
from shards.cli import set_option_format

ROOT = Path(__file__).resolve().parents[2]
_DONE = "done.jsonl"  # the commands that succeeded


def make_parser() -> ArgumentParser:
    """Return the parser of the command line."""
    parser = make_options_parser(__doc__)
    add = parser.add_argument
    add("--data", type=path_word, default="shapes", help="data.source of all runs")
    add("--resize", type=int, help="data.resize of all runs: side of the images, in pixels")
    add("--background", default="white", help="data.background of all runs")
    add("--holdout", type=float, default=0.0, help="data.holdout: fraction held out for testing")
    add("--skip_bad", type=bool, default=False, help="data.skip_bad: leave damaged images out")
    add("--scale", default="small", help="small (minutes), medium (hours on CPUs), full (GPUs)")
    add("--only", help=f"comma-separated, of {', '.join(names_of_exercises())}; default all")
    add("--out", type=path_word, help="folder of runs and pages; default runs/exercises/DATA-SCALE")
    add("--parallel", type=int, help="runs trained at a time; default 1 on GPUs, else one per core")
    add("--processes", type=int, default=1, help="processes per run (accelerate launch)")
    add("--exercises", type=path_word, help="folder of exercises; default launch/configs/exercises")
    return parser


class CommandError(Exception):
    """A command failed with an exit code."""

    def __init__(self, code: int, message: str):
        super().__init__(message)
        self.code = code


class Commands:
    """Runs commands with a log each; those that succeeded are not run again."""

    def __init__(self, folder: Path):
        self.folder, self.lock = folder, threading.Lock()
        self.running: set[subprocess.Popen[bytes]] = set()
        self.stopping = False
        folder.mkdir(parents=True, exist_ok=True)
        self.done = [line.get("command") for line in read_lines(folder / _DONE)]

    def run(
        self, title: str, words: list[str], checkpoint: int | None = None, again: bool = False
    ) -> None:
        """Run a Python script, unless it has succeeded before (on the same checkpoint, if any)."""
        key = words if checkpoint is None else [*words, f"at {checkpoint}"]
        if key in self.done and not again:
            return
        log = self.folder / "logs" / f"{title.replace(' ', '-')}.txt"
        log.parent.mkdir(exist_ok=True)
        began = time.monotonic()
        with self.lock, open(log, "ab") as file:
            if self.stopping:
                raise CommandError(STOPPED, f"{title} was not started")
            process = subprocess.Popen(
                [sys.executable, *words], stdout=file, stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches it through `stop` only
            )  # fmt: skip
            self.running.add(process)
        print(f"{title} ... (its output: {log})", flush=True)
        code = process.wait()
        with self.lock:
            self.running.discard(process)
        if code:
            lines = log.read_text(errors="replace", encoding="utf-8").strip().splitlines()
            last = lines[-1] if lines else "no output"
            raise CommandError(code, f"{title} ended with code {code} ({log}): {last}")
        took = time.monotonic() - began
        with self.lock, open(self.folder / _DONE, "a", encoding="utf-8") as file:
            file.write(json.dumps({"command": key, "s": round(took, 1)}) + "\n")
        print(f"{title}: {duration(took)}", flush=True)

    def stop(self) -> None:
        """Send SIGTERM to the running commands, which save and exit; start no more."""
        with self.lock:
            self.stopping = True
            for process in self.running:
                process.terminate()


def choose(options: Namespace) -> list[Plan]:
    """Return the exercises of --only; raise UserError for a mistake in them or in a run's keys."""
    folder = Path(options.exercises or FOLDER)
    known = names_of_exercises(folder)
    if not known:
        raise UserError(f"--exercises is {folder}, which holds no exercise: name a folder of them")
    names = known if options.only is None else list(dict.fromkeys(options.only.split(",")))
    for name in names:
        if name not in known:
            raise UserError(f"--only names '{name}': choose from {', '.join(known)}")
    plans = [read_plan(folder / f"{name}.yaml", options.scale) for name in names]
    families = {name: family for family, name in TRAINERS.items()}
    for planned in _runs(plans):
        config_class = family_module(families[planned.trainer]).Config
        parse(config_class, "", _keys(planned, options, Path("run")))
    return plans


def _runs(plans: list[Plan]) -> list[PlannedRun]:
    """Return the runs of all plans, each once."""
    return list({run.name: run for plan in plans for run in plan.runs}.values())


def _data(options: Namespace) -> DataConfig:
    return DataConfig(
        source=options.data, resize=options.resize, background=options.background,
        holdout=options.holdout, skip_bad=options.skip_bad,
    )  # fmt: skip


def _keys(planned: PlannedRun, options: Namespace, folder: Path) -> list[str]:
    data, defaults = _data(options), vars(DataConfig())
    given = {f"data.{k}": value for k, value in vars(data).items() if value != defaults[k]}
    keys = {**given, "data.source": options.data, "run.dir": str(folder), **planned.settings}
    return [
        "--config", os.path.relpath(planned.config),
        *(f"--{key}={as_text(value)}" for key, value in keys.items()),
    ]  # fmt: skip


def train(planned: PlannedRun, options: Namespace, out: Path, commands: Commands) -> None:
    """Train a run, or continue it."""
    keys = _keys(planned, options, out / planned.name)
    words = [_path(f"launch/train_{planned.trainer}.py"), *keys]
    if options.processes > 1:
        count = ["--num_processes", str(options.processes)]
        file = _path("launch/configs/accelerate/ddp.yaml")
        start = ["-m", "accelerate.commands.launch", "--config_file", file, *count]
        words = [*start, *words]
    is_lost = newest_saved(out / planned.name) is None
    commands.run(f"train {planned.name}", words, again=is_lost)


def run_commands(planned: PlannedRun, out: Path, commands: Commands) -> None:
    """Run the commands that follow training: evaluation, and what the page shows."""
    folder = out / planned.name
    for script, *words in planned.commands:
        given = [_path(f"launch/{script}.py"), str(folder), *words]
        commands.run(f"{script} {planned.name}", given, newest_saved(folder))


def _path(name: str) -> str:
    return os.path.relpath(ROOT / name)


def own_cores(parallel: int) -> Callable[[], None]:
    """Return a thread initializer that pins each thread and its processes to separate cores."""
    if not hasattr(os, "sched_setaffinity"):
        return lambda: None
    cores = sorted(os.sched_getaffinity(0))
    parts = iter([set(cores[k::parallel]) or set(cores) for k in range(parallel)])
    # With more threads than cores, they would wait for each other in every layer.
    return lambda: os.sched_setaffinity(0, next(parts))


def write_page(plan: Plan, out: Path, command: list[str]) -> Path:
    """Write the page of an exercise from its run folders."""
    groups: dict[str, list[Run]] = {}
    for planned in plan.runs:
        groups.setdefault(planned.group, []).append(open_run(out / planned.name, planned.name))
    path = out / f"{plan.name}.html"
    write_whole(path, exercise_page(plan.exercise, groups, command))
    return path


def answer(options: Namespace, plans: list[Plan], out: Path) -> None:
    """Train and evaluate all runs, then write the pages; raise CommandError if a command fails."""
    data = _data(options)
    for split in ("test", "train"):  # without test images nothing is built
        ensure(options.data, split=split, resize=options.resize, options=data.options)
    commands = Commands(out)
    runs = _runs(plans)
    pool = ThreadPoolExecutor(options.parallel, initializer=own_cores(options.parallel))
    try:
        waiting = [pool.submit(train, planned, options, out, commands) for planned in runs]
        for future in wait(waiting, return_when=FIRST_EXCEPTION).done:
            future.result()
        for planned in runs:  # one at a time: some are timed
            run_commands(planned, out, commands)
    except BaseException:
        commands.stop()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    command = ["python", "launch/exercises.py", *sys.argv[1:]]
    for plan in plans:
        print(f"{plan.exercise.title}: {write_page(plan, out, command)}")


def main() -> int:
    """Train and compare by the options of the command line; return the exit code."""
    for number in set(watched_signals()) & {signal.SIGTERM, signal.SIGHUP}:
        signal.signal(number, signal.default_int_handler)
    options = parse_options(make_parser(), sys.argv[1:])
    set_option_format(lambda option: f"--{option.removeprefix('--').replace('-', '_')}")
    if options.parallel is None:
        options.parallel = 1 if torch.cuda.is_available() else os.cpu_count() or 1
    check_range(options, "--", "parallel", "processes", min=1, max=1024)
    plans = choose(options)
    data = options.data.rstrip("/").split("/")[-1].removeprefix("folder:")
    out = Path(options.out or f"runs/exercises/{data}-{options.scale}")
    check_folder("--out", out)
    try:
        answer(options, plans, out)
    except CommandError as failed:
        print(f"error: {failed}", file=sys.stderr)
        return failed.code if failed.code in (MISTAKE, STOPPED) else FAULT
    except KeyboardInterrupt:
        again = shlex.join(["python", "launch/exercises.py", *sys.argv[1:]])
        print(f"stopped: `{again}` continues", file=sys.stderr)
        return STOPPED
    return 0
