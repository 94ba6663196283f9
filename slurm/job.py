"""A run as a job: start its processes on the nodes there are, and see it through.

What `accelerate launch` would start, Slurm starts here: a process for each GPU, with torch's
variables. The job stays beside them, and when they end it decides: done, a mistake, saved and to be
requeued, or a fault after which they are started again.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from slurm import slurm_cli
from slurm.exit_policy import MISTAKE, STOPPED, Verdict, judge
from slurm.ports import free_port
from slurm.run_state import Record

# One process of a run on a node: Slurm's numbers in torch's words, then the trainer. Where a site
# shows each process one GPU only, that one is its first. One thread, as torchrun says too, lets the
# trainer share out the cores. Slurm signals all of a step: what is around the trainer, such as a
# container's command, must not die of the request to save, and the trainer listens for itself.
RANK = """
if ! [ -d "$DGM_RUN_FOLDER" ]; then
    echo "error: node $SLURMD_NODENAME does not see $DGM_RUN_FOLDER: put run.dir on a disk that" \\
        "all nodes share" >&2
    [ -d "$(dirname "$DGM_EXIT_CODES")" ] && echo 2 >> "$DGM_EXIT_CODES"
    exit 2
fi
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID MASTER_ADDR=$SLURM_LAUNCH_NODE_IPADDR
[ -n "${OMP_NUM_THREADS-}" ] || export OMP_NUM_THREADS=1 DGM_DEFAULT_THREADS=1
case ${CUDA_VISIBLE_DEVICES-} in "" | *,*) ;; *) export LOCAL_RANK=0 ;; esac
trap '' USR2
exec "$@"
"""
ASK_AGAIN_S = 2.0  # to stop: processes that are still importing do not listen


@dataclass(frozen=True)
class Job:
    """One run and how to start it."""

    run: str  # its folder
    command: tuple[str, ...]  # python, the trainer, and its configuration as it was submitted
    config: str  # that configuration's file
    submission: str  # its name, under which starts and ends are written down
    processes: int = 1  # on each node
    sizes: tuple[int, ...] = (1,)  # numbers of processes among which its batch divides
    environment: dict[str, str] = field(default_factory=dict)  # which chooses the engine
    srun: tuple[str, ...] = ()  # more options
    max_faults: int = 3  # starts in a row that may come to nothing

    def __call__(self) -> NoReturn:
        """See the run through on what Slurm (or this machine) gives, and exit with its code."""
        record = Record(Path(self.run))
        record.folder.mkdir(parents=True, exist_ok=True)
        log = os.open(record.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(log, 1)
        os.dup2(log, 2)
        self.snapshot(record)
        nodes = SlurmNodes(self) if os.environ.get("SUBMITIT_EXECUTOR") == "slurm" else Here(self)
        sys.exit(_Watch(self, record, nodes).see_through())

    @staticmethod
    def read(path: Path) -> Job:
        """Read a job that was written as JSON."""
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found.update({key: tuple(v) for key, v in found.items() if isinstance(v, list)})
        return Job(**found)

    def snapshot(self, record: Record) -> None:
        """Keep the configuration and the command that were submitted, in the run folder."""
        shutil.copy(self.config, record.folder / "config.yaml")
        (record.folder / "command.txt").write_text(
            shlex.join(self.command) + "\n", encoding="utf-8"
        )


class SlurmNodes:
    """The nodes that Slurm gave this start."""

    def __init__(self, job: Job):
        """Read what was given."""
        self.job = job
        self.hosts = slurm_cli.hosts_of(os.environ["SLURM_JOB_NODELIST"])
        self.id = slurm_cli.own_job_id()
        self.restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))

    def start(self, hosts: list[str], environment: dict[str, str]) -> subprocess.Popen:
        """Start the processes on some of the nodes, this one the first of them."""
        count = len(hosts) * self.job.processes
        words = [
            "srun", f"--nodes={len(hosts)}", f"--nodelist={','.join(hosts)}",
            f"--ntasks={count}", f"--ntasks-per-node={self.job.processes}",
            "--kill-on-bad-exit=1", "--input=none", "--unbuffered",
        ]  # fmt: skip
        words += [*self.job.srun, "bash", "-c", RANK, "rank", *self.job.command]
        return subprocess.Popen(words, env={**os.environ, **environment})

    def requeue(self) -> str | None:
        """Ask Slurm to start this job again; gives the reason where it does not."""
        if not slurm_cli.is_running(self.id):
            return "the job is being ended by Slurm or by scancel"
        return slurm_cli.requeue(self.id)


class Here:
    """This machine, as the only node."""

    def __init__(self, job: Job):
        """Take it."""
        self.job, self.hosts, self.id, self.restart = job, ["localhost"], f"local-{os.getpid()}", 0

    def start(self, hosts: list[str], environment: dict[str, str]) -> subprocess.Popen:
        """Start the processes, under one that watches them."""
        words = [
            sys.executable,
            "-m",
            "slurm.local_launcher",
            str(self.job.processes),
            *self.job.command,
        ]
        return subprocess.Popen(words, env={**os.environ, **environment})

    def requeue(self) -> str | None:
        """Tell why there is no second start."""
        return "this machine has no queue: run the same command to continue"


class _Watch:
    """Beside the processes of a run, from their start to the verdict."""

    def __init__(self, job: Job, record: Record, nodes: SlurmNodes | Here):
        self.job, self.record, self.nodes = job, record, nodes
        self.asked = False  # to stop: by the time limit, by preemption, or by someone
        self.child: subprocess.Popen | None = None
        for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup lets SIGHUP be
                signal.signal(number, self.note)

    def note(self, number: int, frame: FrameType | None) -> None:
        """Remember the request and pass it on; srun, too, passes it to every process."""
        self.asked = True
        if self.child is not None:
            with contextlib.suppress(ProcessLookupError):
                self.child.send_signal(signal.SIGUSR2)

    def see_through(self) -> int:
        """Start the run until it ends or has to be requeued; give the exit code."""
        for attempt in range(10**6):
            hosts = self.usable_hosts()
            if not hosts:
                return MISTAKE
            verdict = self.attempt(hosts, attempt)
            if verdict.next == "again":
                continue
            if verdict.next == "requeue":
                why_not = self.nodes.requeue()
                if why_not is None:
                    time.sleep(600)  # Slurm ends this start
                    why_not = "Slurm took the request, and did nothing for ten minutes"
                say(f"not requeued: {why_not}")
            return verdict.code
        raise AssertionError("a run was started a million times")

    def usable_hosts(self) -> list[str]:
        """Choose as many nodes as the batch divides among."""
        hosts = list(self.nodes.hosts)
        while hosts and len(hosts) * self.job.processes not in self.job.sizes:
            hosts.pop()
        if not hosts:
            say(
                f"error: the batch does not divide among {len(self.nodes.hosts)} nodes of "
                f"{self.job.processes} processes: change train.global_batch or --nodes"
            )
        elif len(hosts) < len(self.nodes.hosts):
            say(f"{len(hosts)} of {len(self.nodes.hosts)} nodes serve: the batch divides by them")
        return hosts

    def attempt(self, hosts: list[str], number: int) -> Verdict:
        """Start the processes, wait for their end, and judge."""
        record, job, nodes = self.record, self.job, self.nodes
        saved, faults = record.images_saved(), record.fruitless(job.submission)
        place = f"{nodes.id}.{nodes.restart}.{number}"
        count = len(hosts) * job.processes
        who = {"submission": job.submission, "job": nodes.id, "restart": nodes.restart}
        record.add("start", **who, nodes=hosts, processes=count, images=saved)
        say(f"start {place} on {', '.join(hosts)}: {count} processes")
        code, said = self.run_processes(hosts, place)
        now = record.images_saved()
        verdict = judge(code, said, self.asked, now > saved, faults, job.max_faults)
        record.add(
            "end", **who, code=code, codes=said, verdict=verdict.name, next=verdict.next,
            progress=now > saved, images=now,
        )  # fmt: skip
        say(f"end {place}: {verdict.name} (code {code}), then: {verdict.next}")
        return verdict

    def run_processes(self, hosts: list[str], place: str) -> tuple[int, list[int]]:
        """Run the processes to their end; give the code of all, and those they left behind."""
        if self.asked:
            return STOPPED, []
        codes = self.record.folder / f".codes-{place}"
        codes.touch()
        environment = {
            **self.job.environment,
            "WORLD_SIZE": str(len(hosts) * self.job.processes),
            "LOCAL_WORLD_SIZE": str(self.job.processes),
            "MASTER_PORT": str(free_port(f"{self.job.run} {place}")),
            "DGM_EXIT_CODES": str(codes),
            "DGM_RUN_FOLDER": self.job.run,
            # A requeued job may begin before its last start is quite dead.
            "DGM_LOCK_WAIT_S": os.environ.get("DGM_LOCK_WAIT_S", "180"),
            "PYTHONUNBUFFERED": "1",
        }
        self.child = self.nodes.start(hosts, environment)
        code = None
        while code is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = self.child.wait(ASK_AGAIN_S)
            if self.asked:
                self.note(signal.SIGUSR2, None)
        self.child = None
        said = [int(line) for line in codes.read_text(encoding="utf-8").split()]
        codes.unlink()
        return code, said


def say(text: str) -> None:
    """Write a line of the job's own into the log."""
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} job: {text}", flush=True)


if __name__ == "__main__":  # on this machine; on a cluster submitit calls the job
    Job.read(Path(sys.argv[1]))()
