"""Submit a run, or a sweep of runs: `python -m slurm.submit launch/train_ddpm.py ...`.

    python -m slurm.submit launch/train_ddpm.py --config FILE [--sweep FILE] [--nodes N]
        [--gpus-per-node G] [--cluster PROFILE|local|debug] [--dry-run] [-- --section.key VALUE ...]

A run that is preempted, reaches its time limit or loses a node saves if it can, is requeued and
continues by itself.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from functools import partial
from pathlib import Path

import yaml

from dgm.common.command_line import run_command
from dgm.common.errors import UserError
from slurm import preflight, slurm_cli, status
from slurm.accelerate_env import read_accelerate
from slurm.options import NOT_SLURM, Request, read_options
from slurm.preflight import Plan
from slurm.run_state import FOLDER
from slurm.submission import Submission, run_in_process, run_local, submission_folder, submit
from slurm.sweep import read_sweep, words_of


def main(arguments: list[str] | None = None) -> int:
    """Submit a run or a sweep; return the exit code."""
    request = read_options(sys.argv[1:] if arguments is None else arguments)
    cluster = request.options.cluster
    if cluster not in NOT_SLURM and not slurm_cli.present():
        raise UserError(
            "there is no Slurm on this machine (no sbatch): submit from a login node, choose "
            "--cluster local, or try with `make cluster-up`"
        )
    environment = read_accelerate(Path(request.options.accelerate_config))
    plans, base = make_plans(request, environment)
    if request.options.only_failed:
        plans = choose_failed(plans)
        if not plans:
            print("nothing to submit: every run is done, queued or running")
            return 0
    checks = check(request, plans)
    stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    submission = Submission(request, (base / FOLDER / stamp).absolute(), plans, environment)
    for name, text in checks.items():
        print(f"{name + ':':13}{text}")
    if request.options.dry_run:
        show(submission)
        return 0
    if cluster == "debug":
        run_in_process(plans[0], request.script, environment)
        return 0
    with submission_folder(submission):
        if cluster == "local":
            return run_local(submission)
        shards = plans[0].config["data"]["shards"]
        paths = [submission.home, *([Path(shards).expanduser().absolute()] if shards else [])]
        print(f"{'nodes:':13}{preflight.check_nodes(paths, request.resources)}")
        ids = submit(submission)
    for plan, job in zip(plans, ids, strict=True):
        print(f"submitted job {job}: {plan.run}")
    print(f"status: python -m slurm.status {base}")
    return 0


def make_plans(request: Request, environment: dict[str, str]) -> tuple[list[Plan], Path]:
    """Check each set with the trainer; return the plans and the folder of all runs."""
    options, resources = request.options, request.resources
    sets = read_sweep(Path(options.sweep)) if options.sweep else {"": {}}
    words = [] if options.config is None else ["--config", options.config]
    words += request.overrides
    low, high = resources.node_range
    processes = [n * resources.processes for n in range(low, high + 1)]
    lines = {name: [*words, *words_of(keys)] for name, keys in sets.items()}
    build = not options.dry_run
    answers = preflight.examine(request.script, lines, processes, environment, build)
    plans = []
    base = None
    for name, answer in answers.items():
        config = yaml.safe_load(answer["config"])
        run = Path(answer["run_dir"])
        if name and "run.dir" not in sets[name]:
            base = base or run
            run = run / name
            config["run"]["dir"] = str(run)
        base = base or (run.parent if name else run)
        plans.append(
            Plan(
                name, run, config, tuple(answer["processes"]),
                answer["checkpoint_bytes"], answer["shards"], answer["code"],
            )
        )  # fmt: skip
    assert base is not None
    return plans, base


def choose_failed(plans: list[Plan]) -> list[Plan]:
    """Return the plans of runs that ended without being done, are held or were never submitted.

    Jobs that Slurm holds are cancelled.
    """
    rows = status.rows([plan.state for plan in plans])
    chosen = {row.run for row in rows if row.state in {*status.ENDED, "by hand"} - {"done"}}
    slurm_cli.cancel([row.job for row in rows if row.state == "held"])
    return [plan for plan in plans if plan.run in chosen]


def check(request: Request, plans: list[Plan]) -> dict[str, str]:
    """Run all checks before the submission; return a line of each, or raise UserError."""
    count = "1 run" if len(plans) == 1 else f"{len(plans)} sets"
    lines = {
        "config": f"{count}, checked by {request.script}",
        "run folders": preflight.check_folders(plans),
        "shards": plans[0].shards,
        "disk": preflight.check_disk(plans),
    }
    if request.options.cluster not in NOT_SLURM:
        lines["lead time"] = preflight.check_lead(plans, request.resources)
        lines["requeue"] = preflight.check_requeue()
    return lines


def show(submission: Submission) -> None:
    """Print the batch script, and each task's folder and command."""
    if submission.request.options.cluster not in NOT_SLURM:
        executor = submission.executor()
        if len(submission.plans) > 1:
            executor.parameters["map_count"] = len(submission.plans)
        print("\n# batch script")
        print(executor._make_submission_file_text(executor._submitit_command_str, "dry-run"))
    for number, plan in enumerate(submission.plans):
        job = submission.job(plan)
        print(f"\n# task {number}{': ' + plan.name if plan.name else ''}")
        print(f"run folder:  {plan.run}")
        print(f"processes:   {', '.join(map(str, job.sizes))}")
        print(f"command:     {shlex.join(job.command)}")
        variables = " ".join(f"{k}={v}" for k, v in job.environment.items())
        print(f"environment: {variables or 'unchanged'}")


command = partial(run_command, main)


if __name__ == "__main__":
    command()
