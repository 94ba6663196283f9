"""The resources that a run requests: from flags, or from a profile in slurm/clusters/."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dgm.common.errors import UserError
from dgm.common.validation import check_range

MAX_NODES = 10_000
PROFILES = Path(__file__).parent / "clusters"


@dataclass(frozen=True)
class Resources:
    """The resources that a run requests of a cluster."""

    nodes: str = "1"
    """Nodes: N, or MIN-MAX to take as many as are free; the number may differ at each start."""
    gpus_per_node: int = 1
    """GPUs of each node; 0 trains on CPUs."""
    processes_per_node: int | None = None
    """Processes on each node; null is one per GPU, or one without GPUs."""
    cpus_per_process: int | None = None
    """Cores for each process."""
    mem: str | None = None
    """Memory of each node in sbatch's notation: 64G."""
    partition: str | None = None
    """Partition; null is the cluster's default."""
    account: str | None = None
    """Account to charge."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Features that nodes must have."""
    time: str = "4:00:00"
    """Time limit of each start in sbatch's notation: minutes, or 4:00:00. A run that needs longer
    continues in the next start, and short jobs are scheduled earlier."""
    lead_s: int = 120
    """Seconds before the time limit at which a run is asked to save and stop."""
    setup: list[str] = field(default_factory=list)
    """Shell lines before the run: module load ..., source ..., export ..."""
    srun: list[str] = field(default_factory=list)
    """Further options of srun, for instance of a container: --container-image=..."""
    sbatch: dict[str, str] = field(default_factory=dict)
    """Further options of sbatch by name, without dashes: {mail-type: FAIL, exclusive: true}."""
    python: str | None = None
    """Command that runs the trainer's Python, for instance apptainer exec IMAGE python; null is the
    Python that submits."""

    @property
    def node_range(self) -> tuple[int, int]:
        """Return the minimum and maximum number of nodes; raise UserError for invalid ones."""
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", self.nodes)
        low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= low <= high <= MAX_NODES:
            raise UserError(
                f"--nodes is {self.nodes}: give a number of nodes, or MIN-MAX such as 2-4, "
                f"up to {MAX_NODES}"
            )
        return low, high

    @property
    def processes(self) -> int:
        """Return the number of processes per node."""
        return self.processes_per_node or max(1, self.gpus_per_node)

    def check(self) -> None:
        """Raise UserError where a value is out of range or contradicts another."""
        check_range(self, "--", "gpus-per-node", min=0)
        check_range(self, "--", "lead-s", "processes-per-node", "cpus-per-process", min=1)
        if self.gpus_per_node and self.processes > self.gpus_per_node:
            raise UserError(
                f"--processes-per-node is {self.processes}, but a node has {self.gpus_per_node} "
                f"GPUs and each process needs its own: choose {self.gpus_per_node} or fewer"
            )
        try:
            shlex.split(self.python or "")
        except ValueError as error:
            raise UserError(
                f"--python is {self.python}, which is not a command ({error}): correct its quotes"
            ) from None
        if self.time_s <= self.lead_s:
            raise UserError(
                f"--lead-s is {self.lead_s}, but --time {self.time} leaves only {self.time_s} s: "
                "give more time, or a shorter lead"
            )
        _ = self.node_range  # raises where it is not valid

    @property
    def time_s(self) -> int:
        """Return the time limit in seconds; raise UserError where it is not in Slurm's notation."""
        match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", self.time)
        if match is None:
            raise UserError(f"--time is {self.time}: write minutes, 12:00:00 or 2-00:00:00")
        days, clock = match[1], [int(part) for part in match.groups()[1:] if part is not None]
        if days is None and len(clock) < 3:  # minutes come first, else hours
            clock.insert(0, 0)
        hours, minutes, seconds = (*clock, 0, 0)[:3]
        return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds

    def sbatch_options(self) -> dict[str, Any]:
        """Return sbatch's options by name."""
        low, high = self.node_range
        fixed, cores = low == high, self.cpus_per_process
        options: dict[str, Any] = {
            "nodes": self.nodes,
            # With a range of nodes, ntasks-per-node would make Slurm allocate the minimum only.
            "ntasks-per-node": self.processes if fixed else None,
            "cpus-per-task": cores if fixed else None,
            "mincpus": None if fixed else self.processes * (cores or 1),
            "gpus-per-node": self.gpus_per_node or None,
            "mem": self.mem,
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "constraint": self.constraint,
            "time": self.time,
            # To the batch script, which forwards it and so knows why the run stopped.
            "signal": f"B:USR2@{self.lead_s}",
            "requeue": True,
            "open-mode": "append",
        }
        flags = {n: True if v.lower() == "true" else v for n, v in self.sbatch.items()}
        return {name: value for name, value in options.items() if value is not None} | flags


def profile_path(name: str) -> Path:
    """Return the file of a profile, by name or path; raise UserError where there is none."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else PROFILES / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in PROFILES.glob("*.yaml")))
        raise UserError(
            f"--cluster {name}: there is no {path}; choose local, debug, {known}, or a YAML file"
        )
    return path
