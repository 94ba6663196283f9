"""A run as a job: start its processes on the allocated nodes and act on how they end.

Slurm starts what `accelerate launch` would start: one process per GPU, with torch's environment
variables. The job waits for them and then ends (done, mistake), is requeued (stopped after saving)
or starts them again (fault).
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from dgm.common.atomic_io import replacing, write_whole
from dgm.common.errors import UserError
from slurm import slurm_cli
from slurm.exit_policy import MISTAKE, STOPPED, Decision, decide
from slurm.run_state import RunState

# Starts one process of a run with torch's environment variables, from those of Slurm. Where a site
# shows each process one GPU only, that GPU has local rank 0. One thread, as with torchrun, unless
# set: the trainer then divides the cores. Slurm signals every process of a step: USR2 is ignored,
# so that a wrapper such as a container's command survives it; the trainer installs its handler.
RANK_SCRIPT = """
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
REPEAT_REQUEST_S = 2.0  # a stop request is repeated: processes that are importing ignore it
# Below the ports that Linux assigns to connections (net.ipv4.ip_local_port_range).
_FIRST_PORT, _NUM_PORTS = 20_000, 12_000


@dataclass(frozen=True)
class Job:
    """One run and how to start it."""

    run: str  # run folder
    command: tuple[str, ...]  # python, the trainer, and its configuration as it was submitted
    config: str  # file of that configuration
    submission: str  # identifies the submission in the history
    processes: int = 1  # processes per node
    sizes: tuple[int, ...] = (1,)  # world sizes by which the batch is divisible
    environment: dict[str, str] = field(default_factory=dict)  # variables that choose the engine
    srun: tuple[str, ...] = ()  # further options of srun
    max_faults: int = 3  # failed starts in a row after which the run is given up

    def __call__(self) -> NoReturn:
        """Run until it ends or is requeued, on Slurm's nodes or on this machine, and exit."""
        state = RunState(Path(self.run))
        state.folder.mkdir(parents=True, exist_ok=True)
        log = os.open(state.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(log, 1)
        os.dup2(log, 2)
        self.snapshot(state)
        on_slurm = os.environ.get("SUBMITIT_EXECUTOR") == "slurm"
        sys.exit(_Supervisor(self, state, SlurmNodes(self) if on_slurm else LocalNode(self)).run())

    @staticmethod
    def read(path: Path) -> Job:
        """Read a job from its JSON file."""
        fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        fields.update({key: tuple(v) for key, v in fields.items() if isinstance(v, list)})
        return Job(**fields)

    def snapshot(self, state: RunState) -> None:
        """Copy the submitted configuration and command into the run folder."""
        with replacing(state.folder / "config.yaml") as partial:
            partial.touch(mode=0o600)  # it may contain credentials
            shutil.copy(self.config, partial)  # with its mode
        write_whole(state.folder / "command.txt", shlex.join(self.command) + "\n")


class SlurmNodes:
    """The nodes that Slurm allocated to this start."""

    def __init__(self, job: Job):
        """Read the allocation from Slurm's environment variables."""
        self.job = job
        nodes = os.environ["SLURM_JOB_NODELIST"]
        self.hosts = slurm_cli.call("scontrol", "show", "hostnames", nodes).split()
        array = os.environ.get("SLURM_ARRAY_JOB_ID")
        task = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else None
        self.id = task or os.environ["SLURM_JOB_ID"]  # as squeue prints it
        self.restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))

    def start(self, hosts: list[str], environment: dict[str, str]) -> subprocess.Popen:
        """Start the processes on `hosts`, this node first; return srun, which runs them."""
        count = len(hosts) * self.job.processes
        words = [
            "srun", f"--nodes={len(hosts)}", f"--nodelist={','.join(hosts)}",
            f"--ntasks={count}", f"--ntasks-per-node={self.job.processes}",
            "--kill-on-bad-exit=1", "--input=none", "--unbuffered",
        ]  # fmt: skip
        words += [*self.job.srun, "bash", "-c", RANK_SCRIPT, "rank", *self.job.command]
        return subprocess.Popen(words, env={**os.environ, **environment})

    def requeue(self) -> str | None:
        """Requeue this job; return the reason if that fails."""
        if not slurm_cli.is_running(self.id):
            return "the job is being ended by Slurm or by scancel"
        try:
            slurm_cli.call("scontrol", "requeue", self.id)
        except UserError as error:
            return str(error)
        return None


class LocalNode:
    """This machine as the only node."""

    def __init__(self, job: Job):
        """Use this machine."""
        self.job, self.hosts, self.id, self.restart = job, ["localhost"], f"local-{os.getpid()}", 0

    def start(self, hosts: list[str], environment: dict[str, str]) -> subprocess.Popen:
        """Start the processes under `slurm.local_launcher`."""
        words = [sys.executable, "-m", "slurm.local_launcher", str(self.job.processes)]
        return subprocess.Popen([*words, *self.job.command], env={**os.environ, **environment})

    def requeue(self) -> str | None:
        """Return why there is no second start."""
        return "this machine has no queue: run the same command to continue"


class _Supervisor:
    """Starts the processes of a run, forwards requests to stop, and decides what follows."""

    def __init__(self, job: Job, state: RunState, nodes: SlurmNodes | LocalNode):
        self.job, self.state, self.nodes = job, state, nodes
        self.stop_requested = False  # set by the time limit, preemption or a user
        self.child: subprocess.Popen | None = None
        for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, self.request_stop)

    def request_stop(self, number: int = 0, frame: FrameType | None = None) -> None:
        """Forward a request to stop; srun forwards it to every process."""
        self.stop_requested = True
        if self.child is not None:
            with contextlib.suppress(ProcessLookupError):
                self.child.send_signal(signal.SIGUSR2)

    def run(self) -> int:
        """Start the run until it ends or is requeued; return the job's exit code."""
        hosts, attempt = self.usable_hosts(), 0
        if not hosts:
            return MISTAKE
        while (decision := self.attempt(hosts, attempt)).action == "again":
            attempt += 1
        if decision.action == "requeue":
            reason = self.requeue()
            if reason is None:
                time.sleep(600)  # Slurm ends this start
                reason = "Slurm accepted the request, but nothing happened in ten minutes"
            log(f"not requeued: {reason}")
        return decision.exit_code

    def requeue(self) -> str | None:
        """Requeue the job, after which SIGTERM ends this process; return the reason if that fails.

        Slurm sends SIGTERM at once, and waits for KillWait (30 s by default) before it kills.
        """
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            reason = self.nodes.requeue()
            if reason is None:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
            return reason
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})

    def usable_hosts(self) -> list[str]:
        """Return as many nodes as divide the batch; log an error and return [] if none do."""
        hosts = list(self.nodes.hosts)
        while hosts and len(hosts) * self.job.processes not in self.job.sizes:
            hosts.pop()
        if not hosts:
            log(
                f"error: the batch cannot be divided among {len(self.nodes.hosts)} nodes of "
                f"{self.job.processes} processes: change train.global_batch or --nodes"
            )
        elif len(hosts) < len(self.nodes.hosts):
            log(f"using {len(hosts)} of {len(self.nodes.hosts)} nodes, which divide the batch")
        return hosts

    def attempt(self, hosts: list[str], number: int) -> Decision:
        """Start the processes, wait for their end and decide what follows."""
        state, job, nodes = self.state, self.job, self.nodes
        before, failures = state.images_saved(), state.failures_in_a_row(job.submission)
        start_id = f"{nodes.id}.{nodes.restart}.{number}"
        count = len(hosts) * job.processes
        ids = {"submission": job.submission, "job": nodes.id, "restart": nodes.restart}
        state.add_event("start", **ids, nodes=hosts, processes=count, images=before)
        log(f"start {start_id} on {', '.join(hosts)}: {count} processes")
        code, rank_codes = self.run_processes(hosts, start_id)
        after = state.images_saved()
        progress = after > before
        decision = decide(code, rank_codes, self.stop_requested, progress, failures, job.max_faults)
        state.add_event(
            "end", **ids, code=code, codes=rank_codes, verdict=decision.outcome,
            next=decision.action, progress=progress, images=after,
        )  # fmt: skip
        log(f"end {start_id}: {decision.outcome} (code {code}), then: {decision.action}")
        return decision

    def run_processes(self, hosts: list[str], start_id: str) -> tuple[int, list[int]]:
        """Run the processes; return the exit code of the launcher and those the ranks recorded."""
        if self.stop_requested:
            return STOPPED, []
        codes = self.state.folder / f".codes-{start_id}"
        codes.touch()
        environment = {
            **self.job.environment,
            "WORLD_SIZE": str(len(hosts) * self.job.processes),
            "LOCAL_WORLD_SIZE": str(self.job.processes),
            "MASTER_PORT": str(free_port(f"{self.job.run} {start_id}")),
            "DGM_EXIT_CODES": str(codes),
            "DGM_RUN_FOLDER": self.job.run,
            # A requeued job may begin before its last start has fully ended.
            "DGM_LOCK_WAIT_S": os.environ.get("DGM_LOCK_WAIT_S", "180"),
            "PYTHONUNBUFFERED": "1",
        }
        self.child = self.nodes.start(hosts, environment)
        code = None
        while code is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = self.child.wait(REPEAT_REQUEST_S)
            if self.stop_requested:
                self.request_stop()
        self.child = None
        rank_codes = [int(line) for line in codes.read_text(encoding="utf-8").split()]
        codes.unlink()
        return code, rank_codes


def free_port(start_id: str) -> int:
    """Return a free port of this machine for the rendezvous of a start.

    The search begins at a hash of `start_id`, so that tasks of an array on one node, a start and
    the remains of the one before, and jobs of two clusters on one machine use different ports.
    """
    begin = zlib.crc32(start_id.encode())
    for offset in range(_NUM_PORTS):
        port = _FIRST_PORT + (begin + offset) % _NUM_PORTS
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise RuntimeError(f"no port from {_FIRST_PORT} to {_FIRST_PORT + _NUM_PORTS - 1} is free")


def log(text: str) -> None:
    """Print a line of the job itself."""
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} job: {text}", flush=True)


if __name__ == "__main__":  # on this machine; on a cluster submitit calls the job
    Job.read(Path(sys.argv[1]))()
