"""Calling Slurm's commands and parsing their output."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass

from dgm.common.errors import UserError

LIVE = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "REQUEUED",
        "REQUEUE_HOLD", "SPECIAL_EXIT", "STAGE_OUT", "SIGNALING", "RESIZING")  # fmt: skip


@dataclass(frozen=True)
class State:
    """The state of a job in Slurm."""

    name: str  # PENDING, RUNNING, COMPLETED, FAILED, TIMEOUT, CANCELLED, NODE_FAIL ...
    reason: str = ""  # why it waits

    @property
    def live(self) -> bool:
        """Whether the job runs or is queued."""
        return self.name in LIVE

    @property
    def held(self) -> bool:
        """Whether the job waits until a user or an administrator releases it."""
        stuck = ("held", "Held", "Never", "InvalidAccount", "InvalidQOS")
        return self.name == "PENDING" and any(word in self.reason for word in stuck)


def call(*words: str, timeout: float = 60, env: dict[str, str] | None = None) -> str:
    """Return what a command of Slurm prints; raise UserError with its own message if it fails."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=timeout, env=env)
    except FileNotFoundError:
        raise UserError(
            f"there is no {words[0]} on this machine: submit from a login node of a Slurm cluster, "
            "or choose --cluster local"
        ) from None
    except subprocess.TimeoutExpired:
        raise UserError(
            f"{words[0]} did not answer in {timeout:.0f} s: is Slurm's controller up?"
        ) from None
    if done.returncode != 0:
        output = " ".join((done.stderr or done.stdout).split())
        raise UserError(f"{words[0]} failed: {output or f'code {done.returncode}'}")
    return done.stdout


def present() -> bool:
    """Return whether this machine belongs to a Slurm cluster."""
    return shutil.which("sbatch") is not None


def states(ids: set[str]) -> dict[str, State]:
    """Return the states of jobs, without those that Slurm no longer knows.

    squeue knows live jobs and those of the last minutes, sacct all jobs if accounting is enabled.
    """
    if not ids or not present():
        return {}
    found: dict[str, State] = {}
    columns = "--format=%i|%T|%r"
    for line in call("squeue", "--noheader", "--array", "--states=all", columns).splitlines():
        job, name, reason = line.split("|", 2)
        if job in ids:
            found[job] = State(name, reason)
    missing = sorted(ids - found.keys())
    if missing:
        try:
            accounts = call(
                "sacct", "--noheader", "--parsable2", "--allocations",
                f"--jobs={','.join(missing)}", "--format=JobID,State",
            )  # fmt: skip
        except UserError:
            return found  # no accounting
        for line in accounts.splitlines():
            job, _, name = line.partition("|")
            # Tasks that never started share one line, "7_[2-5]", and stay missing.
            if job in missing:
                found[job] = State(name.split()[0])  # "CANCELLED by 1000"
    return found


def is_running(job: str) -> bool:
    """Return whether a job runs and is not being ended."""
    return "RUNNING" in re.findall(r"JobState=(\S+)", call("scontrol", "show", "job", "-o", job))


def cancel(jobs: list[str]) -> None:
    """Cancel jobs, running or queued."""
    if jobs:
        call("scancel", *jobs)
