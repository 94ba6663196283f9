"""Correctness on a GPU without pytest: `python tests/gpu/check.py OUT SHARDS`.

Run from the root of the repository; SHARDS is a folder of train shards of 32 x 32 images. Each
group of kernels and steps is checked in a process of its own, whole runs in parallel processes. The
results are in OUT/checks.json, rewritten after each check. Without a GPU the same is checked on
the CPU, kernels in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from dgm.benchmarks.processes import ROOT
from dgm.common.command_line import Parser, run_command
from dgm.common.errors import UserError
from tests.gpu.checks import kernels, runs, steps
from tests.gpu.checks.registry import Context, Report, carry_out
from tests.gpu.processes import end_on_signals, kill_group, last_line
from tests.gpu.schedule import Outcome
from tests.support.interpreted import mend_interpreter

GROUPS = {"kernels": kernels.GROUP, "steps": steps.GROUP}
START_S = 60.0  # to start a process on the GPU
NO_TIME = Outcome("failed", "no time was left for it")


def main() -> int:
    """Run the checks; return 0 if none failed, else 1."""
    parser = Parser(description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for checks.json")
    parser.add_argument("shards", type=Path, metavar="SHARDS")
    parser.add_argument("--groups", nargs="+", choices=(*GROUPS, "runs"), help="default all")
    parser.add_argument("--quick", action="store_true", help="fewer checks, for a trial")
    parser.add_argument("--seconds", type=float, default=600, help="time limit of all checks")
    parser.add_argument("--scratch", type=Path, help="folder for runs; default a temporary one")
    parser.add_argument("--worker", choices=tuple(GROUPS), help=argparse.SUPPRESS)
    parser.add_argument("--done", nargs="*", default=[], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not (args.shards / "index.json").exists():
        raise UserError(f"SHARDS is {args.shards}, which holds no index.json: name train shards")
    if args.worker:
        signal.setitimer(signal.ITIMER_REAL, START_S)
    gpu = torch.cuda.is_available()
    if not gpu:
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is first imported
    if args.worker:
        return work(args.worker, Context(args.shards, args.scratch, gpu, args.quick), args.done)
    with tempfile.TemporaryDirectory(prefix="checks-", ignore_cleanup_errors=True) as folder:
        scratch = args.scratch or Path(folder)
        scratch.mkdir(parents=True, exist_ok=True)
        return check_all(Context(args.shards.resolve(), scratch.resolve(), gpu, args.quick), args)


def check_all(context: Context, args: argparse.Namespace) -> int:
    """Run the chosen groups of checks, in parallel on a GPU, else one after the other."""
    start = time.monotonic()
    end_on_signals(at_once=True)
    if not context.gpu:
        print("no GPU: checked on the CPU, kernels in Triton's interpreter", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    report, ends = Report(args.out / "checks.json"), start + args.seconds
    jobs = min(12, os.cpu_count() or 1) if context.gpu else 1
    threads = []
    for group in args.groups or [*GROUPS, "runs"]:
        target, given = (supervise, group) if group in GROUPS else (compare_runs, jobs)
        threads.append(threading.Thread(target=target, args=(given, context, report, ends)))
        threads[-1].start()
        if not context.gpu:
            threads[-1].join()
    for thread in threads:
        thread.join()
    states = [found.state for found in report.found.values()]
    counts = ", ".join(f"{states.count(s)} {s}" for s in ("passed", "failed", "skipped"))
    print(f"{counts}; {time.monotonic() - start:.0f} s", flush=True)
    return int("failed" in states)


def work(group: str, context: Context, done: list[str]) -> int:
    """Run a group's checks that are not `done`; print each result as a JSON line.

    A check that exceeds its time ends this process, by a signal that no hanging call can delay.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print to stdout too
    if not context.gpu:
        mend_interpreter()
    for check in GROUPS[group].chosen(context):
        if check.name not in done:
            signal.setitimer(signal.ITIMER_REAL, check.seconds)
            found = carry_out(check, context)
            answer = {"name": check.name, "found": dataclasses.asdict(found)}
            print(json.dumps(answer), file=answers, flush=True)
    sys.stdout.flush()
    os._exit(0)  # after an error on the GPU, an ordinary exit may hang


def supervise(group: str, context: Context, report: Report, ends: float) -> None:
    """Run a group's checks in a worker process, which is replaced when a check hangs or dies."""
    checks = GROUPS[group].chosen(context)
    done: list[str] = []
    while len(done) < len(checks):
        if time.monotonic() > ends:
            for check in checks[len(done) :]:
                report.add(check.name, NO_TIME)
            return
        code, log = _run_worker(group, context, report, ends, done)
        if len(done) < len(checks) and time.monotonic() < ends:
            check = checks[len(done)]
            found = Outcome("failed", f"its process ended with code {code}: {last_line(log)}")
            if code == -signal.SIGALRM:
                found = Outcome("failed", f"took more than {check.seconds:g} s", check.seconds)
            report.add(check.name, found)
            done.append(check.name)


def _run_worker(
    group: str, context: Context, report: Report, ends: float, done: list[str]
) -> tuple[int, Path]:
    """Run a worker, at most until `ends`; report its results and add their names to `done`.

    Return its exit code and its log.
    """
    words = [sys.executable, Path(sys.argv[0]).resolve(), context.scratch, context.shards]
    words += ["--worker", group, "--scratch", context.scratch / group]
    words += [*(["--quick"] if context.quick else []), "--done", *done]
    log = context.scratch / f"{group}.txt"
    with log.open("a") as output:
        process = subprocess.Popen(
            words, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=output,
            text=True, start_new_session=True,
        )  # fmt: skip
    timer = threading.Timer(max(0.0, ends - time.monotonic()), kill_group, [process])
    timer.start()
    try:
        assert process.stdout is not None
        for line in process.stdout:
            answer = json.loads(line)
            report.add(answer["name"], Outcome(**answer["found"]))
            done.append(answer["name"])
        return process.wait(), log
    finally:
        timer.cancel()
        kill_group(process)


def compare_runs(jobs: int, context: Context, report: Report, ends: float) -> None:
    """Start the training runs, and run the checks that compare them."""
    everything = runs.Runs(context, jobs, ends)
    try:
        for check in runs.add_checks(everything, context).chosen(context):
            is_late = time.monotonic() > ends
            report.add(check.name, NO_TIME if is_late else carry_out(check, context))
    finally:
        everything.close()


if __name__ == "__main__":
    run_command(main)
