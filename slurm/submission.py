"""Runs that are submitted together: what is written for them, and how they are handed over."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit

from dgm.common.errors import UserError
from dgm.common.redact import without_password
from dgm.common.yaml_io import write_yaml
from slurm import slurm_cli, status
from slurm.job import Job
from slurm.options import Asked
from slurm.preflight import Plan
from slurm.run_state import FOLDER
from slurm.snapshot import copy_code


@dataclass(frozen=True)
class Submission:
    """Runs that are submitted together, and the folder of what they share."""

    asked: Asked
    home: Path  # code, configurations, and what submitit writes
    plans: list[Plan]
    environment: dict[str, str]

    def job(self, plan: Plan) -> Job:
        """Describe a run for the node that it will start on."""
        script = self.home / "code" / "launch" / Path(self.asked.script).name
        config = self.home / "configs" / f"{plan.name or 'run'}.yaml"
        snapshot = str(Path(plan.run).absolute() / FOLDER / "config.yaml")
        resources = self.asked.resources
        python = shlex.split(resources.python or sys.executable)
        cores = resources.cpus_per_process
        return Job(
            run=str(plan.run.absolute()),
            command=(*python, str(script), "--config", snapshot),
            config=str(config),
            submission=self.home.name,
            processes=resources.processes,
            sizes=plan.sizes,
            environment=self.environment,
            srun=((f"--cpus-per-task={cores}",) if cores else ()) + tuple(resources.srun),
            max_faults=self.asked.options.max_faults,
        )

    def write(self) -> None:
        """Copy the code and write the configurations."""
        copy_code(self.home / "code", self.plans[0].code)
        (self.home / "configs").mkdir()
        for plan in self.plans:
            text = write_yaml(plan.config)
            path = self.home / "configs" / f"{plan.name or 'run'}.yaml"
            path.touch(mode=0o666 if without_password(text) == text else 0o600)
            path.write_text(text, encoding="utf-8")

    def executor(self) -> submitit.SlurmExecutor:
        """Set up submitit for this cluster."""
        resources, options = self.asked.resources, self.asked.options
        # In the shell's place, so that Slurm's signals to the batch script reach the job.
        python = f"exec {shlex.quote(sys.executable)}"
        if found := re.search(r"%[jtAa]|\\", str(self.home)):
            raise UserError(
                f"run.dir leads to {self.home.parents[1]}, of which Slurm would not leave "
                f"{found[0]} as it is: choose another run.dir"
            )
        executor = submitit.SlurmExecutor(self.home / "submitit", python=python)
        task = "%A_%a" if len(self.plans) > 1 else "%j"  # as submitit names it, too
        output = f"{executor.folder}/".replace("%", "%%") + f"{task}_0_log.out"
        more = {
            name: value if value is True else _in_a_line(name, str(value))
            for name, value in {**resources.sbatch_options(), "output": output}.items()
        }
        executor.update_parameters(
            job_name=_in_a_line("job-name", self.home.parents[1].name),
            array_parallelism=options.max_parallel or 64,
            setup=[*resources.setup, f"export PYTHONPATH={shlex.quote(str(self.home / 'code'))}"],
            stderr_to_stdout=True,
            use_srun=False,  # the job itself starts its processes
            additional_parameters=more,
        )
        return executor


@contextlib.contextmanager
def kept_on_success(submission: Submission) -> Iterator[None]:
    """Make the submission's folder; take it away again where nothing comes of it."""
    existing = next(p for p in submission.home.parents if p.exists())
    submission.home.mkdir(parents=True)
    try:
        submission.write()
        yield
    except BaseException:
        if not any(
            plan.record.job().get("submission") == submission.home.name for plan in submission.plans
        ):
            shutil.rmtree(submission.home, ignore_errors=True)
            for folder in submission.home.parents:
                if folder == existing:
                    break
                with contextlib.suppress(OSError):
                    folder.rmdir()
        raise


def submit(submission: Submission) -> list[str]:
    """Hand the runs to Slurm; gives their ids. Raises UserError with Slurm's own message."""
    executor = submission.executor()
    try:
        with contextlib.redirect_stderr(io.StringIO()), executor.batch():
            jobs = [executor.submit(submission.job(plan)) for plan in submission.plans]
    except Exception as error:  # of submitit's several kinds, all with sbatch's words in them
        said = re.findall(r"sbatch: error: (.*)", str(error))
        told = "; ".join(dict.fromkeys(said)) or " ".join(str(error).split())
        raise UserError(f"sbatch refuses: {told}") from None
    ids = [job.job_id for job in jobs]
    if not slurm_cli.may_requeue(ids[0]):
        slurm_cli.cancel(ids)
        raise UserError(
            f"the cluster does not let job {ids[0]} be requeued, so a run could not continue by "
            "itself; it was cancelled: ask the administrators, or use another partition"
        )
    for plan, job in zip(submission.plans, ids, strict=True):
        note(submission, plan, cluster="slurm", job=job)
    return ids


def run_here(submission: Submission) -> int:
    """Run the same jobs on this machine, some at once, and wait; give the highest exit code."""
    environment = {**os.environ, "PYTHONPATH": str(submission.home / "code")}
    codes: list[int] = []
    running: dict[subprocess.Popen, Plan] = {}
    for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup lets SIGHUP be
            signal.signal(number, signal.default_int_handler)
    waiting = list(submission.plans)
    most = submission.asked.options.max_parallel or 1
    try:
        while waiting or running:
            while waiting and len(running) < most:
                plan = waiting.pop(0)
                path = submission.home / "configs" / f"{plan.name or 'run'}.json"
                path.write_text(
                    json.dumps(dataclasses.asdict(submission.job(plan))), encoding="utf-8"
                )
                # A session of its own: Ctrl-C is ours, and we pass it on.
                words = [sys.executable, "-m", "slurm.job", str(path)]
                job = subprocess.Popen(words, env=environment, start_new_session=True)
                note(submission, plan, cluster="local", job=f"local-{job.pid}", pid=job.pid)
                print(f"started {plan.run}: see {plan.record.log}", flush=True)
                running[job] = plan
            time.sleep(0.2)
            for job in [job for job in running if job.poll() is not None]:
                codes.append(job.returncode)
                _say_end(running.pop(job))
    except KeyboardInterrupt:
        print("stopping: the runs save; the same command continues them", flush=True)
        for job, plan in running.items():
            job.send_signal(signal.SIGUSR2)
            job.wait()
            _say_end(plan)
        return 75
    return max(codes)


def in_this_process(plan: Plan, script: str, environment: dict[str, str]) -> None:
    """Be the trainer, for a debugger: one process of the code as it lies here."""
    folder = plan.record.folder
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "config.yaml"
    config.write_text(write_yaml(plan.config), encoding="utf-8")
    os.environ.update(environment)
    sys.argv = [script, "--config", str(config)]
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        if not (plan.run / "config.yaml").exists():  # a mistake, met before there was a run
            shutil.rmtree(folder)
            with contextlib.suppress(OSError):
                plan.run.rmdir()


def _in_a_line(name: str, value: str) -> str:
    """Write a value for a line of #SBATCH, where a backslash takes away the next one's meaning."""
    if not re.fullmatch(r"[A-Za-z][\w-]*", name) or not value.isprintable():
        told = f"{name} is {value!r}" if name.isprintable() else f"sbatch has the option {name!r}"
        raise UserError(
            f"{told}, which does not fit a line of #SBATCH: leave out line breaks and other "
            "characters that cannot be printed, also of run.dir"
        )
    return value.replace("\\", "\\\\")


def _say_end(plan: Plan) -> None:
    row = status.rows([plan.record])[0]
    print(f"{row.state}: {plan.run}{': ' * bool(row.error)}{row.error}", flush=True)


def note(submission: Submission, plan: Plan, **job: Any) -> None:
    """Write the job into its run folder, where status and the next submission look."""
    command = ["python", "-m", "slurm.submit", *map(without_password, sys.argv[1:])]
    total = plan.config["train"]["total_images"]
    shared = {"submission": submission.home.name, "command": command, "set": plan.name}
    plan.record.write_job({**job, **shared, "total_images": total})
