"""Runs that are submitted together: writing their files, starting them on Slurm or locally."""

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

from dgm.common.atomic_io import replacing, write_whole
from dgm.common.errors import UserError
from dgm.common.exit_codes import STOPPED
from dgm.common.redact import without_password
from dgm.common.yaml_io import write_yaml
from slurm import slurm_cli, status
from slurm.job import Job
from slurm.options import Request
from slurm.preflight import Plan
from slurm.run_state import FOLDER

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("dgm", "shards", "launch", "slurm")


@dataclass(frozen=True)
class Submission:
    """Runs that are submitted together, and the folder of the files they share."""

    request: Request
    home: Path  # folder with a copy of the code, configurations, and submitit's files
    plans: list[Plan]
    environment: dict[str, str]

    def job(self, plan: Plan) -> Job:
        """Return the job of a run."""
        script = self.home / "code" / "launch" / Path(self.request.script).name
        config = self.home / "configs" / f"{plan.name or 'run'}.yaml"
        snapshot = str(Path(plan.run).absolute() / FOLDER / "config.yaml")
        resources = self.request.resources
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
            max_faults=self.request.options.max_faults,
        )

    def write(self) -> None:
        """Copy the code, so that a queued job runs what was submitted; write configurations."""
        code = self.home / "code"
        for name in PACKAGES:
            ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
            shutil.copytree(ROOT / name, code / name, ignore=ignored)
        commit = json.dumps(self.plans[0].code)  # the copy is not a git repository
        (code / "snapshot.json").write_text(commit + "\n", encoding="utf-8")
        (self.home / "configs").mkdir()
        for plan in self.plans:
            _write_config(self.home / "configs" / f"{plan.name or 'run'}.yaml", plan.config)

    def executor(self) -> submitit.SlurmExecutor:
        """Return submitit's executor for this cluster."""
        resources, options = self.request.resources, self.request.options
        # exec replaces the shell, so that Slurm's signals to the batch script reach the job.
        python = f"exec {shlex.quote(sys.executable)}"
        if match := re.search(r"%[jtAa]|\\", str(self.home)):
            raise UserError(
                f"run.dir leads to {self.home.parents[1]}, in which Slurm would replace "
                f"{match[0]}: choose another run.dir"
            )
        executor = submitit.SlurmExecutor(self.home / "submitit", python=python)
        task = "%A_%a" if len(self.plans) > 1 else "%j"  # as submitit names it
        output = f"{executor.folder}/".replace("%", "%%") + f"{task}_0_log.out"
        parameters = {
            name: value if value is True else _sbatch_value(name, str(value))
            for name, value in {**resources.sbatch_options(), "output": output}.items()
        }
        executor.update_parameters(
            job_name=_sbatch_value("job-name", self.home.parents[1].name),
            array_parallelism=options.max_parallel or 64,
            setup=[*resources.setup, f"export PYTHONPATH={shlex.quote(str(self.home / 'code'))}"],
            stderr_to_stdout=True,
            use_srun=False,  # the job itself starts its processes
            additional_parameters=parameters,
        )
        return executor


@contextlib.contextmanager
def submission_folder(submission: Submission) -> Iterator[None]:
    """Create and fill the submission's folder; remove it if no run was started."""
    existing = next(p for p in submission.home.parents if p.exists())
    submission.home.mkdir(parents=True)
    try:
        submission.write()
        yield
    except BaseException:
        if not any(
            plan.state.job().get("submission") == submission.home.name for plan in submission.plans
        ):
            shutil.rmtree(submission.home, ignore_errors=True)
            for folder in submission.home.parents:
                if folder == existing:
                    break
                with contextlib.suppress(OSError):
                    folder.rmdir()
        raise


def submit(submission: Submission) -> list[str]:
    """Submit the runs to Slurm and return their ids; raise UserError with Slurm's own message."""
    executor = submission.executor()
    try:
        with contextlib.redirect_stderr(io.StringIO()), executor.batch():
            jobs = [executor.submit(submission.job(plan)) for plan in submission.plans]
    except Exception as error:  # submitit raises several types, with sbatch's message
        lines = re.findall(r"sbatch: error: (.*)", str(error))
        reason = "; ".join(dict.fromkeys(lines)) or " ".join(str(error).split())
        raise UserError(f"sbatch refuses: {reason}") from None
    ids = [job.job_id for job in jobs]
    if "Requeue=0" in slurm_cli.call("scontrol", "show", "job", "-o", ids[0]):
        slurm_cli.cancel(ids)
        raise UserError(
            f"the cluster does not allow job {ids[0]} to be requeued, so the submission could not "
            "continue by itself; it was cancelled: ask the administrators, or use another partition"
        )
    for plan, job in zip(submission.plans, ids, strict=True):
        write_job(submission, plan, cluster="slurm", job=job)
    return ids


def run_local(submission: Submission) -> int:
    """Run the same jobs on this machine, `max_parallel` at a time; return the highest exit code."""
    environment = {**os.environ, "PYTHONPATH": str(submission.home / "code")}
    codes: list[int] = []
    running: dict[subprocess.Popen, Plan] = {}
    for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, signal.default_int_handler)
    waiting = list(submission.plans)
    try:
        while waiting or running:
            while waiting and len(running) < (submission.request.options.max_parallel or 1):
                plan = waiting.pop(0)
                path = submission.home / "configs" / f"{plan.name or 'run'}.json"
                write_whole(path, json.dumps(dataclasses.asdict(submission.job(plan))))
                # In a new session: Ctrl-C reaches this process only, which forwards it.
                words = [sys.executable, "-m", "slurm.job", str(path)]
                job = subprocess.Popen(words, env=environment, start_new_session=True)
                write_job(submission, plan, cluster="local", job=f"local-{job.pid}", pid=job.pid)
                print(f"started {plan.run}: see {plan.state.log}", flush=True)
                running[job] = plan
            time.sleep(0.2)
            for job in [job for job in running if job.poll() is not None]:
                codes.append(job.returncode)
                _print_end(running.pop(job))
    except KeyboardInterrupt:
        print("stopping: the runs save; the same command continues them", flush=True)
        for job, plan in running.items():
            job.send_signal(signal.SIGUSR2)
            job.wait()
            _print_end(plan)
        return STOPPED
    return max(codes)


def run_in_process(plan: Plan, script: str, environment: dict[str, str]) -> None:
    """Run the trainer in this process, for a debugger, without a copy of the code."""
    folder = plan.state.folder
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "config.yaml"
    _write_config(config, plan.config)
    os.environ.update(environment)
    sys.argv = [script, "--config", str(config)]
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        if not (plan.run / "config.yaml").exists():  # an error before the run began
            shutil.rmtree(folder)
            with contextlib.suppress(OSError):
                plan.run.rmdir()


def _write_config(path: Path, config: dict[str, Any]) -> None:
    """Write a configuration; only its owner may read it if an address has credentials."""
    text = write_yaml(config)
    with replacing(path) as partial:
        partial.touch(mode=0o666 if without_password(text) == text else 0o600)
        partial.write_text(text, encoding="utf-8")


def _sbatch_value(name: str, value: str) -> str:
    """Return a value with backslashes escaped, for a line of #SBATCH; raise UserError if unfit."""
    if not re.fullmatch(r"[A-Za-z][\w-]*", name) or not value.isprintable():
        given = f"{name} is {value!r}" if name.isprintable() else f"sbatch has the option {name!r}"
        raise UserError(
            f"{given}, which does not fit a line of #SBATCH: leave out line breaks and other "
            "characters that cannot be printed, also in run.dir"
        )
    return value.replace("\\", "\\\\")


def _print_end(plan: Plan) -> None:
    row = status.rows([plan.state])[0]
    print(f"{row.state}: {plan.run}{': ' * bool(row.error)}{row.error}", flush=True)


def write_job(submission: Submission, plan: Plan, **job: Any) -> None:
    """Record the job in its run folder, for status and the next submission."""
    command = ["python", "-m", "slurm.submit", *map(without_password, sys.argv[1:])]
    total = plan.config["train"]["total_images"]
    shared = {"submission": submission.home.name, "command": command, "set": plan.name}
    plan.state.write_job({**job, **shared, "total_images": total})
