"""Submit a run, or a sweep of runs: `python -m slurm.submit launch/train_ddpm.py ...`.

    python -m slurm.submit launch/train_ddpm.py --config FILE [--sweep FILE] [--nodes N]
        [--gpus-per-node G] [--cluster PROFILE|local|debug] [--dry-run] [-- --section.key VALUE ...]

A run that is preempted, reaches its time limit or loses a node saves where it can, goes back into
the queue and continues by itself.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit
import yaml

from slurm import checks, commands, status
from slurm.checks import Plan
from slurm.errors import SlurmError
from slurm.job import Job
from slurm.launcher import read_accelerate
from slurm.options import Asked, read_options
from slurm.record import FOLDER, Record
from slurm.snapshot import copy_code
from slurm.sweep import read_sweep, words_of


@dataclass(frozen=True)
class Submission:
    """Runs that are submitted together, and the folder of what they share."""

    asked: Asked
    home: Path  # code, configurations, and what submitit writes
    plans: list[Plan]
    environment: dict[str, str]

    @property
    def python(self) -> str:
        """Give the Python of the nodes."""
        return self.asked.resources.python or sys.executable

    def job(self, plan: Plan) -> Job:
        """Describe a run for the node that it will start on."""
        script = self.home / "code" / "launch" / Path(self.asked.script).name
        config = self.home / "configs" / f"{plan.name or 'run'}.yaml"
        snapshot = str(Path(plan.run).absolute() / FOLDER / "config.yaml")
        resources = self.asked.resources
        cores = resources.cpus_per_process
        return Job(
            run=str(plan.run.absolute()),
            command=(self.python, str(script), "--config", snapshot),
            config=str(config),
            processes=resources.processes,
            sizes=plan.sizes,
            environment=self.environment,
            srun=((f"--cpus-per-task={cores}",) if cores else ()) + tuple(resources.srun),
            max_faults=self.asked.options.max_faults,
        )

    def write(self) -> None:
        """Copy the code and write the configurations."""
        copy_code(self.home / "code")
        (self.home / "configs").mkdir()
        for plan in self.plans:
            text = yaml.safe_dump(plan.config, sort_keys=False)
            (self.home / "configs" / f"{plan.name or 'run'}.yaml").write_text(text)

    def executor(self) -> submitit.SlurmExecutor:
        """Set up submitit for this cluster."""
        resources, options = self.asked.resources, self.asked.options
        # In the shell's place, so that Slurm's signals to the batch script reach the job.
        python = f"exec {shlex.quote(self.python)}"
        executor = submitit.SlurmExecutor(self.home / "submitit", python=python)
        more = resources.sbatch_options()
        executor.update_parameters(
            job_name=self.home.parents[1].name,
            array_parallelism=options.max_parallel,
            setup=[*resources.setup, f"export PYTHONPATH={shlex.quote(str(self.home / 'code'))}"],
            stderr_to_stdout=True,
            use_srun=False,  # the job itself starts its processes
            additional_parameters=more,
        )
        return executor


def main(arguments: list[str]) -> int:
    """Submit what the command line says."""
    asked = read_options(arguments)
    cluster = asked.options.cluster
    if cluster not in ("local", "debug") and not commands.present():
        raise SlurmError(
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
    with _home(submission):
        if cluster == "debug":
            Record(plans[0].run).add("submitted", cluster=cluster)
            submission.job(plans[0]).in_this_process()
            return 0
        if cluster == "local":
            return run_here(submission)
        shards = plans[0].config["data"]["shards"]
        paths = [submission.home, *([Path(shards).absolute()] if shards else [])]
        print(f"{'nodes:':13}{checks.check_nodes(paths, asked.resources)}")
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
    answers = checks.examine(asked.script, lines, processes, environment, build)
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
                answer["checkpoint_bytes"], answer["shards"],
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
    commands.cancel([row.job for row in rows if row.state == "held"])
    return [plan for plan in plans if plan.run in again + fresh]


def check(asked: Asked, plans: list[Plan]) -> dict[str, str]:
    """Look at everything that can be known before; raises SlurmError."""
    count = "1 run" if len(plans) == 1 else f"{len(plans)} sets"
    told = {
        "config": f"{count}, understood by {asked.script}",
        "run folders": checks.check_folders(plans),
        "shards": plans[0].shards,
        "disk": checks.check_disk(plans),
    }
    if asked.options.cluster not in ("local", "debug"):
        told["lead time"] = checks.check_lead(plans, asked.resources)
        told["requeue"] = checks.check_requeue()
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


@contextlib.contextmanager
def _home(submission: Submission) -> Iterator[None]:
    """Make the submission's folder; take it away again where nothing comes of it."""
    existing = next(p for p in submission.home.parents if p.exists())
    submission.home.mkdir(parents=True)
    try:
        submission.write()
        yield
    except BaseException:
        if not any(
            plan.record.job().get("home") == str(submission.home) for plan in submission.plans
        ):
            shutil.rmtree(submission.home, ignore_errors=True)
            for folder in submission.home.parents:
                if folder == existing:
                    break
                with contextlib.suppress(OSError):
                    folder.rmdir()
        raise


def submit(submission: Submission) -> list[str]:
    """Hand the runs to Slurm; gives their ids. Raises SlurmError with Slurm's own message."""
    executor = submission.executor()
    try:
        with executor.batch():
            jobs = [executor.submit(submission.job(plan)) for plan in submission.plans]
    except Exception as error:  # of submitit's several kinds, all with sbatch's words in them
        said = " ".join(line.strip() for line in str(error).splitlines() if "sbatch:" in line)
        raise SlurmError(said or " ".join(str(error).split())) from None
    ids = [job.job_id for job in jobs]
    if not commands.may_requeue(ids[0]):
        commands.cancel(ids)
        raise SlurmError(
            f"the cluster does not let job {ids[0]} be requeued, so a run could not continue by "
            "itself; it was cancelled: ask the administrators, or use another partition"
        )
    for plan, job in zip(submission.plans, ids, strict=True):
        note(submission, plan, cluster="slurm", job=job)
    return ids


def run_here(submission: Submission) -> int:
    """Run the same jobs on this machine, some at once, and wait; give the highest exit code."""
    os.environ["PYTHONPATH"] = str(submission.home / "code")
    executor = submitit.LocalExecutor(submission.home / "submitit")
    executor.update_parameters(timeout_min=60 * 24 * 365)
    codes: list[int] = []
    running: list[tuple[Plan, Any]] = []
    waiting = list(submission.plans)
    try:
        while waiting or running:
            while waiting and len(running) < submission.asked.options.max_parallel:
                plan = waiting.pop(0)
                job = executor.submit(submission.job(plan))
                note(
                    submission,
                    plan,
                    cluster="local",
                    job=f"local-{job.job_id}",
                    pid=int(job.job_id),
                )
                print(f"started {plan.run}: see {plan.record.log}", flush=True)
                running.append((plan, job))
            time.sleep(0.2)
            for plan, job in [(plan, job) for plan, job in running if job.done()]:
                running.remove((plan, job))
                row = status.rows([plan.record])[0]
                print(f"{row.state}: {plan.run}{': ' * bool(row.error)}{row.error}", flush=True)
                codes.append(0 if row.state == "done" else _code_of(plan))
    except KeyboardInterrupt:
        for _, job in running:
            job._interrupt()
        print("stopping: the runs save; the same command continues", flush=True)
        while not all(job.done() for _, job in running):
            time.sleep(0.2)
        return 75
    return max(codes)


def _code_of(plan: Plan) -> int:
    ends = [line for line in plan.record.history() if line["event"] == "end"]
    return {"mistake": 2, "stopped": 75}.get(ends[-1]["verdict"] if ends else "", 1)


def note(submission: Submission, plan: Plan, **job: Any) -> None:
    """Write the job into its run folder, where status and the next submission look."""
    command = ["python", "-m", "slurm.submit", *sys.argv[1:]]
    total = plan.config["train"]["total_images"]
    shared = {"home": str(submission.home), "command": command, "set": plan.name}
    plan.record.write_job({**job, **shared, "total_images": total})
    plan.record.add("submitted", job=job["job"])


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except SlurmError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
