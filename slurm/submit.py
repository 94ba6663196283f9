"""Submit a run, or a sweep of runs: `python -m slurm.submit launch/train_ddpm.py ...`.

    python -m slurm.submit launch/train_ddpm.py --config FILE [--sweep FILE] [--nodes N]
        [--gpus-per-node G] [--cluster PROFILE|local|debug] [--dry-run] [-- --section.key VALUE ...]

A run that is preempted, reaches its time limit or loses a node saves where it can, goes back into
the queue and continues by itself.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from pathlib import Path
from typing import NoReturn

import yaml

from dgm.common.errors import UserError
from dgm.common.streams import keep_streams
from slurm import preflight, slurm_cli, status
from slurm.accelerate_env import read_accelerate
from slurm.options import Asked, read_options
from slurm.preflight import Plan
from slurm.run_state import FOLDER
from slurm.submission import Submission, in_this_process, kept_on_success, run_here, submit
from slurm.sweep import read_sweep, words_of


def main(arguments: list[str]) -> int:
    """Submit what the command line says."""
    asked = read_options(arguments)
    cluster = asked.options.cluster
    if cluster not in ("local", "debug") and not slurm_cli.present():
        raise UserError(
            "there is no Slurm on this machine (no sbatch): submit from a login node, choose "
            "--cluster local, or try with `make cluster-up`"
        )
    environment = read_accelerate(Path(asked.options.accelerate_config))
    plans, base = make_plans(asked, environment)
    if asked.options.only_failed:
        plans = choose_failed(plans)
        if not plans:
            print("nothing to submit: every run is done, queued or running")
            return 0
    told = check(asked, plans)
    stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    submission = Submission(asked, (base / FOLDER / stamp).absolute(), plans, environment)
    for name, text in told.items():
        print(f"{name + ':':13}{text}")
    if asked.options.dry_run:
        show(submission)
        return 0
    if cluster == "debug":
        in_this_process(plans[0], asked.script, environment)
        return 0
    with kept_on_success(submission):
        if cluster == "local":
            return run_here(submission)
        shards = plans[0].config["data"]["shards"]
        paths = [submission.home, *([Path(shards).expanduser().absolute()] if shards else [])]
        print(f"{'nodes:':13}{preflight.check_nodes(paths, asked.resources)}")
        ids = submit(submission)
    for plan, job in zip(plans, ids, strict=True):
        print(f"submitted job {job}: {plan.run}")
    print(f"look at {'it' if len(plans) == 1 else 'them'}: python -m slurm.status {base}")
    return 0


def make_plans(asked: Asked, environment: dict[str, str]) -> tuple[list[Plan], Path]:
    """Let the trainer understand each set; give the plans and the folder of all of them."""
    options, resources = asked.options, asked.resources
    sets = read_sweep(Path(options.sweep)) if options.sweep else {"": {}}
    words = [] if options.config is None else ["--config", options.config]
    words += asked.overrides
    least, most = resources.node_range
    processes = [n * resources.processes for n in range(least, most + 1)]
    lines = {name: [*words, *words_of(keys)] for name, keys in sets.items()}
    build = not options.dry_run
    answers = preflight.examine(asked.script, lines, processes, environment, build)
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
    """Keep the runs that ended without being done, or wait for a person, or never were submitted.

    Those that Slurm still holds are cancelled.
    """
    rows = status.rows([plan.record for plan in plans])
    again = [row.run for row in rows if row.state in status.ENDED and row.state != "done"]
    fresh = [row.run for row in rows if row.state == "by hand"]  # nothing was submitted there
    slurm_cli.cancel([row.job for row in rows if row.state == "held"])
    return [plan for plan in plans if plan.run in again + fresh]


def check(asked: Asked, plans: list[Plan]) -> dict[str, str]:
    """Look at everything that can be known before; raises UserError."""
    count = "1 run" if len(plans) == 1 else f"{len(plans)} sets"
    told = {
        "config": f"{count}, understood by {asked.script}",
        "run folders": preflight.check_folders(plans),
        "shards": plans[0].shards,
        "disk": preflight.check_disk(plans),
    }
    if asked.options.cluster not in ("local", "debug"):
        told["lead time"] = preflight.check_lead(plans, asked.resources)
        told["requeue"] = preflight.check_requeue()
    return told


def show(submission: Submission) -> None:
    """Print the batch script, and each task's folder and command."""
    if submission.asked.options.cluster not in ("local", "debug"):
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
        changed = " ".join(f"{k}={v}" for k, v in job.environment.items())
        print(f"environment: {changed or 'nothing more'}")


def command() -> NoReturn:
    """Run the command and exit."""
    keep_streams()  # what is begun is submitted as a whole
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    command()
