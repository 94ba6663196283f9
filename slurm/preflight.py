"""Checks before a run is submitted: each returns a line to print, or raises UserError."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from dgm.common.errors import UserError
from slurm import slurm_cli
from slurm.resources import Resources
from slurm.run_state import RunState

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Plan:
    """A run to be submitted, with the configuration that its trainer parsed."""

    name: str  # name of the set in the sweep; empty without a sweep
    run: Path
    config: dict[str, Any]  # the whole configuration, with defaults
    sizes: tuple[int, ...]  # world sizes by which the batch is divisible
    checkpoint_bytes: int
    shards: str
    code: dict[str, Any] = field(default_factory=dict)  # git commit

    @property
    def state(self) -> RunState:
        """Return the state kept in its run folder."""
        return RunState(self.run)


def examine(
    script: str,
    sets: dict[str, list[str]],
    processes: list[int],
    environment: dict[str, str],
    build: bool,
) -> dict[str, dict[str, Any]]:
    """Parse and check each set with the trainer itself; return its answers by set.

    Raise UserError that names a set with a mistake.
    """
    request = {"script": script, "sets": sets, "processes": processes, "build": build}
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch" / "preflight.py")],
        input=json.dumps(request),
        env={**os.environ, **environment, "RANK": "0", "WORLD_SIZE": str(processes[-1])},
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode != 0:  # a fault, reported above
        raise UserError(f"{script} failed to check its configuration: see the error above")
    answers = json.loads(done.stdout)
    bad = [(name, answer["error"]) for name, answer in answers.items() if "error" in answer]
    if bad:
        name, error = bad[0]
        others = f" (and {len(bad) - 1} other sets have errors)" if len(bad) > 1 else ""
        raise UserError((f"set {name}: {error}" if name else error) + others)
    return answers


def check_folders(plans: list[Plan]) -> str:
    """Check that no two runs share a folder, and that no live job uses one."""
    for plan in plans:
        names = [p.name for p in plans if p.run.resolve() == plan.run.resolve()]
        if len(names) > 1:
            raise UserError(
                f"the sets {' and '.join(names)} have the same run folder {plan.run}: give each "
                "its own run.dir, or none"
            )
    jobs = {plan.run: plan.state.job() for plan in plans}
    states = slurm_cli.states({j["job"] for j in jobs.values() if j.get("cluster") == "slurm"})
    for run, job in jobs.items():
        state = states.get(job.get("job", ""))
        local = job.get("cluster") == "local" and psutil.pid_exists(job["pid"])
        if local or (state is not None and state.live):
            now = state.name if state else "running on this machine"
            raise UserError(
                f"run folder {run} is in use by job {job['job']} ({now}): scancel it first, or "
                "choose another run.dir"
            )
    return "no live job uses them"


def check_disk(plans: list[Plan]) -> str:
    """Check that the disks have space for the checkpoints that are kept, and one more."""
    needed: Counter[int] = Counter()
    folders: dict[int, Path] = {}
    for plan in plans:
        folder = next(p for p in (plan.run.absolute(), *plan.run.absolute().parents) if p.exists())
        folders[folder.stat().st_dev] = folder
        kept = plan.config["train"]["keep_checkpoints"] + 2  # the best, and the one being written
        needed[folder.stat().st_dev] += kept * plan.checkpoint_bytes
    lines = []
    for device, size in needed.items():
        free = shutil.disk_usage(folders[device]).free
        if size > free:
            raise UserError(
                f"checkpoints need {size / 1e9:.1f} GB, but {folders[device]} has "
                f"{free / 1e9:.1f} GB free: free some, or lower train.keep_checkpoints"
            )
        lines.append(f"checkpoints need {size / 1e9:.2f} GB of {free / 1e9:.0f} GB free")
    return "; ".join(lines)


def check_lead(plans: list[Plan], resources: Resources) -> str:
    """Check that a run has time to save after it was asked to stop."""
    longest, run = 0.0, None
    for plan in plans:
        metrics = plan.state.metrics()
        # A request is handled after the step and its evaluation and samples.
        pauses = ("save", "sample", "eval")
        slowest = [max((m.get(f"time/{p}_s", 0.0) for m in metrics), default=0.0) for p in pauses]
        speeds = [m["time/images_per_s"] for m in metrics if m.get("time/images_per_s")]
        step = plan.config["train"]["global_batch"] / speeds[-1] if speeds else 0.0
        if slowest[0] and sum(slowest) + step > longest:
            longest, run = sum(slowest) + step, plan.run
    if run is None:
        return f"{resources.lead_s} s; no save has been timed yet"
    if longest >= resources.lead_s:
        raise UserError(
            f"--lead-s is {resources.lead_s}, but a step, evaluation and save of {run} have "
            f"taken {longest:.1f} s: choose {round(2 * longest) + 1} or more"
        )
    return f"{resources.lead_s} s; a step, evaluation and save have taken {longest:.1f} s"


def check_requeue() -> str:
    """Return whether the cluster requeues jobs by default."""
    lines = slurm_cli.call("scontrol", "show", "config").splitlines()
    on = any(line.split("=")[-1].strip() == "1" for line in lines if "JobRequeue" in line)
    return "allowed" if on else "off by default; the job requests it (--requeue)"


def check_nodes(paths: list[Path], resources: Resources) -> str:
    """Check on a node, if one is idle, that these paths exist there."""
    options = resources.sbatch_options()
    kept = ("partition", "account", "qos", "constraint", "gpus-per-node")
    flags = [f"--{name}={options[name]}" for name in kept if name in options]
    script = f'for p in {shlex.join(map(str, paths))}; do [ -e "$p" ] || echo "$p"; done; hostname'
    words = ["srun", "--immediate=3", "--nodes=1", "--ntasks=1", "--time=1", "--quiet", *flags]
    try:
        *missing, host = slurm_cli.call(*words, "bash", "-c", script, timeout=30).split("\n")[:-1]
    except (UserError, ValueError):
        return "no node is idle now to check the run folder; each job checks it when it starts"
    if missing:
        raise UserError(
            f"node {host} does not see {missing[0]}: put it on a disk that all nodes share"
        )
    return f"{host} sees the run folder and the shards"
