"""What a run asks of a cluster: from flags, or from a profile in slurm/clusters/."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dgm.common.errors import UserError

MOST_NODES = 10_000
PROFILES = Path(__file__).parent / "clusters"


@dataclass(frozen=True)
class Resources:
    """What a run asks of a cluster."""

    nodes: str = "1"
    """Nodes: N, or MIN-MAX to take what Slurm has; each start may be on another number."""
    gpus_per_node: int = 1
    """GPUs of each node; 0 trains on CPUs."""
    processes_per_node: int | None = None
    """Processes on each node; null is one for each GPU, or one."""
    cpus_per_process: int | None = None
    """Cores for each process."""
    mem: str | None = None
    """Memory of each node, as sbatch has it: 64G."""
    partition: str | None = None
    """Partition."""
    account: str | None = None
    """Account that pays."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Features that nodes must have."""
    time: str = "4:00:00"
    """Time limit of each start, as sbatch has it: minutes, or 4:00:00. A run that needs longer goes
    on in the next one, and short jobs find gaps in the queue."""
    lead_s: int = 120
    """Seconds before the time limit at which a run is told to save."""
    setup: list[str] = field(default_factory=list)
    """Shell lines before the run: module load ..., source ..., export ..."""
    srun: list[str] = field(default_factory=list)
    """More options of srun, for instance of a container: --container-image=..."""
    sbatch: dict[str, str] = field(default_factory=dict)
    """More options of sbatch by name, without dashes: {mail-type: FAIL, exclusive: true}."""
    python: str | None = None
    """Command of the trainer's Python; null is the one that submits. A container's, for instance:
    apptainer exec IMAGE python."""

    @property
    def node_range(self) -> tuple[int, int]:
        """Give the least and the most nodes; raises UserError."""
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", self.nodes)
        least, most = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
        if not 1 <= least <= most <= MOST_NODES:
            raise UserError(
                f"--nodes is {self.nodes}: give a number, or MIN-MAX such as 2-4, "
                f"of {MOST_NODES} at most"
            )
        return least, most

    @property
    def processes(self) -> int:
        """Count the processes of a node."""
        return self.processes_per_node or max(1, self.gpus_per_node)

    def check(self) -> None:
        """Raise UserError where a value makes no sense."""
        for name, least in (("gpus_per_node", 0), ("lead_s", 1)):
            if getattr(self, name) < least:
                raise UserError(f"--{_flag(name)} is {getattr(self, name)}: choose {least} or more")
        for name in ("processes_per_node", "cpus_per_process"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{_flag(name)} is {value}: choose 1 or more")
        if self.gpus_per_node and self.processes > self.gpus_per_node:
            raise UserError(
                f"--processes-per-node is {self.processes}, but a node has {self.gpus_per_node} "
                f"GPUs and each process wants its own: choose {self.gpus_per_node} or fewer"
            )
        try:
            shlex.split(self.python or "")
        except ValueError as error:
            raise UserError(
                f"--python is {self.python}, which is no command ({error}): mend its quotes"
            ) from None
        if self.time_s <= self.lead_s:
            raise UserError(
                f"--lead-s is {self.lead_s}, but --time {self.time} leaves only {self.time_s} s: "
                "give more time, or a shorter lead"
            )
        least, most = self.node_range  # raises where it is none
        assert least <= most

    @property
    def time_s(self) -> int:
        """Give the time limit in seconds; raises UserError where it is not written as Slurm's."""
        found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", self.time)
        if found is None:
            raise UserError(f"--time is {self.time}: write minutes, 12:00:00 or 2-00:00:00")
        days, *rest = (None if part is None else int(part) for part in found.groups())
        first, second, third = rest
        if days is not None:  # D-HH[:MM[:SS]]
            return ((days * 24 + (first or 0)) * 60 + (second or 0)) * 60 + (third or 0)
        if third is not None:  # HH:MM:SS
            return ((first or 0) * 60 + (second or 0)) * 60 + third
        return (first or 0) * 60 + (second or 0)  # MM[:SS]

    def sbatch_options(self) -> dict[str, Any]:
        """Give sbatch's options by name."""
        least, most = self.node_range
        fixed, cores = least == most, self.cpus_per_process
        options: dict[str, Any] = {
            "nodes": self.nodes,
            # To Slurm, tasks of each node set the number of tasks, and that the most nodes.
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
            # To the batch script, which passes it on and then knows why the run stopped.
            "signal": f"B:USR2@{self.lead_s}",
            "requeue": True,
            "open-mode": "append",
        }
        flags = {n: True if v.lower() == "true" else v for n, v in self.sbatch.items()}
        return {name: value for name, value in options.items() if value is not None} | flags


def profile_path(name: str) -> Path:
    """Find a profile by name or path; raises UserError."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else PROFILES / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in PROFILES.glob("*.yaml")))
        raise UserError(
            f"--cluster {name}: there is no {path}; choose local, debug, {known}, or a YAML file"
        )
    return path


def _flag(name: str) -> str:
    return name.replace("_", "-")
