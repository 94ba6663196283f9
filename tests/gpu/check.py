"""Correctness on a GPU without pytest: `python tests/gpu/check.py OUT SHARDS`.

From the root of the repository. SHARDS is a folder of train shards of 32 x 32 images. Kernels and
steps are checked in a process for each group, whole runs as processes beside each other. What was
found lies in OUT/checks.json, written anew after each check. Where there is no GPU the same is
checked on the CPU, kernels in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from dgm.common.command_line import Parser
from dgm.common.errors import UserError
from tests.gpu.checks import kernels, runs, steps
from tests.gpu.checks.registry import Check, Context, Report, carry_out
from tests.gpu.command import run
from tests.gpu.processes import end_on_signals, kill_group
from tests.support.interpreted import mend_interpreter

ROOT = Path(__file__).resolve().parents[2]
GROUPS = {"kernels": kernels.GROUP, "steps": steps.GROUP}
START_S = 60.0  # of a process: imports, and the GPU's own


def main() -> int:
    """Make all checks; 0 where none failed."""
    parser = Parser(description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for checks.json")
    parser.add_argument("shards", type=Path, metavar="SHARDS")
    parser.add_argument("--groups", nargs="+", choices=(*GROUPS, "runs"), help="default all")
    parser.add_argument("--quick", action="store_true", help="fewer checks, for a trial")
    parser.add_argument("--seconds", type=float, default=600, help="for all of it")
    parser.add_argument("--jobs", type=int, help="runs beside each other")
    parser.add_argument("--scratch", type=Path, help="folder for runs; default a temporary one")
    parser.add_argument("--worker", choices=tuple(GROUPS), help=argparse.SUPPRESS)
    parser.add_argument("--done", nargs="*", default=[], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not (args.shards / "index.json").exists():
        raise UserError(f"SHARDS is {args.shards}, which holds no index.json: name train shards")
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # Triton asks when it is first imported
    scratch = args.scratch or Path(tempfile.mkdtemp(prefix="checks-"))
    context = Context(
        args.shards.resolve(), scratch.resolve(), torch.cuda.is_available(), args.quick
    )
    try:
        if args.worker:
            return work(args.worker, context, args.done)
        return check_all(context, args)
    finally:
        if args.scratch is None:
            shutil.rmtree(scratch, ignore_errors=True)


def check_all(context: Context, args: Any) -> int:
    """Make the chosen groups of checks beside each other on a GPU, else one after the other."""
    start = time.monotonic()
    end_on_signals(at_once=True)
    if not context.gpu:
        print("no GPU: checked on the CPU, kernels in Triton's interpreter", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    report, ends = Report(args.out / "checks.json"), start + args.seconds
    chosen = args.groups or [*GROUPS, "runs"]
    threads = [
        threading.Thread(target=supervise, args=(name, context, report, ends))
        for name in GROUPS
        if name in chosen
    ]
    if "runs" in chosen:
        jobs = args.jobs or (min(12, os.cpu_count() or 1) if context.gpu else 1)
        threads.append(threading.Thread(target=compare_runs, args=(context, report, ends, jobs)))
    for thread in threads:
        thread.start()
        if not context.gpu:
            thread.join()
    for thread in threads:
        thread.join()
    states = [found["state"] for found in report.found.values()]
    counts = ", ".join(f"{states.count(s)} {s}" for s in ("passed", "failed", "skipped"))
    print(f"{counts}; {time.monotonic() - start:.0f} s", flush=True)
    return int("failed" in states)


def work(group: str, context: Context, done: list[str]) -> int:
    """Make a group's checks that are not `done`; one line of JSON before and after each."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    if not context.gpu:
        mend_interpreter()
    for check in GROUPS[group].chosen(context):
        if check.name in done:
            continue
        print(json.dumps({"begins": check.name}), file=answers, flush=True)
        found = carry_out(check, context)
        print(json.dumps({"ends": check.name, "found": found}), file=answers, flush=True)
    answers.close()
    sys.stdout.flush()
    os._exit(0)  # a GPU that an error broke may refuse to be left


def supervise(group: str, context: Context, report: Report, ends: float) -> None:
    """Run a group's checks in a worker process, which is replaced when it hangs or dies."""
    left = {check.name: check for check in GROUPS[group].chosen(context)}
    while left and time.monotonic() < ends:
        before = len(left)
        _one_process(group, left, context, report, ends)
        if len(left) == before:  # not even the first began
            break
    for name in left:
        report.add(name, {"state": "failed", "detail": "no time was left for it", "seconds": 0.0})


def _one_process(
    group: str, left: dict[str, Check], context: Context, report: Report, ends: float
) -> None:
    done = [check.name for check in GROUPS[group].chosen(context) if check.name not in left]
    words = [sys.executable, __file__, str(context.scratch), str(context.shards)]
    words += ["--worker", group, "--scratch", str(context.scratch / group)]
    words += [*(["--quick"] if context.quick else []), "--done", *done]
    log = context.scratch / f"{group}.txt"
    context.scratch.mkdir(parents=True, exist_ok=True)
    with log.open("a") as output:
        process = subprocess.Popen(
            words, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=output,
            text=True, start_new_session=True,
        )  # fmt: skip
    answers: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_read, args=(process, answers), daemon=True).start()
    running, start, limit = None, time.monotonic(), START_S
    try:
        while left:
            wait = min(limit, ends - start) - (time.monotonic() - start)
            try:
                line = answers.get(timeout=max(0.01, wait))
            except queue.Empty:
                _give_up(running, left, report, f"took more than {time.monotonic() - start:.0f} s")
                return
            if not line:
                code = process.wait()
                _give_up(running, left, report, f"its process ended with code {code}")
                return
            answer = json.loads(line)
            if "begins" in answer:
                running, start = answer["begins"], time.monotonic()
                limit = left[running].seconds
            else:
                del left[answer["ends"]]
                report.add(answer["ends"], answer["found"])
                running, start, limit = None, time.monotonic(), START_S
    finally:
        kill_group(process)


def _read(process: subprocess.Popen[str], answers: queue.Queue[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        answers.put(line)
    answers.put("")


def _give_up(running: str | None, left: dict[str, Check], report: Report, why: str) -> None:
    name = running or next(iter(left))
    seconds = left.pop(name).seconds
    report.add(name, {"state": "failed", "detail": why, "seconds": seconds})


def compare_runs(context: Context, report: Report, ends: float, jobs: int) -> None:
    """Start the training runs, and make the checks that compare them."""
    everything = runs.Runs(context, jobs, ends)
    try:
        for check in runs.add_checks(everything, context).chosen(context):
            if time.monotonic() > ends:
                found = {"state": "failed", "detail": "no time was left for it", "seconds": 0.0}
                report.add(check.name, found)
                continue
            report.add(check.name, carry_out(check, context))
    finally:
        everything.close()


if __name__ == "__main__":
    run(main)
