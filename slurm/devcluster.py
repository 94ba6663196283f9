"""A real Slurm cluster of four nodes on one machine, for testing jobs and sweeps.

    python -m slurm.devcluster up [DIR]      start it, and print the variable for Slurm's commands
    python -m slurm.devcluster down [DIR]    end its jobs and daemons; with `--after PID`, once
                                             process PID has ended

It runs Debian's daemons (`apt-get install slurm-wlm munge`) as the user who starts them, with all
files in DIR and listening on this machine only.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

from dgm.common.command_line import Parser, run_command
from dgm.common.errors import UserError
from slurm import slurm_cli

NODES = ("n1", "n2", "n3", "n4")
DAEMONS = ("munged", "slurmctld", "slurmd", "slurmstepd", "srun", "sbatch", "mungekey")
DEFAULT = Path(".cluster")

# A requeued job can start only after the credentials of its last start have expired: by default two
# minutes, here cred_expire. The nodes share the cores of the machine, which are allocated several
# times. Jobs of the partition `urgent` preempt those of `main`, which get a signal, half a minute
# to save, and are requeued.
CONFIG = """\
ClusterName=four
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
SlurmctldParameters=idle_on_node_suspend
SlurmdParameters=config_overrides
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
JobCompType=jobcomp/none
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout={node_timeout_s}
KillWait=5
MessageTimeout=30
InactiveLimit=0
MaxArraySize=1001
{nodes}
PartitionName=DEFAULT Nodes={names} MaxTime=INFINITE State=UP OverSubscribe=NO
PartitionName=main Default=YES PriorityTier=1 GraceTime=30
PartitionName=urgent PriorityTier=10 PreemptMode=OFF
"""


class DevCluster:
    """The cluster with its files in one folder."""

    def __init__(self, folder: Path, node_timeout_s: int = 30):
        """Set its folder and the time after which a silent node is considered dead."""
        self.folder = folder.resolve()
        self.node_timeout_s = node_timeout_s
        self.config = self.folder / "slurm.conf"

    @property
    def environment(self) -> dict[str, str]:
        """Return the variables with which Slurm's commands find the cluster."""
        return {"SLURM_CONF": str(self.config)}

    def up(self) -> None:
        """Start all daemons and wait until the four nodes are idle, else raise UserError."""
        missing = missing_daemons()
        if missing:
            raise UserError(f"{', '.join(missing)} missing: apt-get install slurm-wlm munge")
        if self.config.exists():
            raise UserError(f"{self.folder} holds a cluster already: take it down first")
        (self.folder / "state").mkdir(parents=True)
        self._write_config()
        self.run("mungekey", "--create", f"--keyfile={self.folder}/munge.key")
        try:
            self.run(
                "munged", "--force", f"--socket={self.folder}/munge.socket",
                f"--key-file={self.folder}/munge.key", f"--pid-file={self.folder}/munged.pid",
                f"--log-file={self.folder}/munged.log", f"--seed-file={self.folder}/munged.seed",
            )  # fmt: skip
            self.start_controller()
            for name in NODES:
                self.start_node(name)
            self.wait_until_idle()
        except BaseException:
            self.down()
            raise

    def start_controller(self) -> None:
        """Start the controller, without any former jobs."""
        self.run("slurmctld", "-c")

    def start_node(self, name: str) -> None:
        """Start the daemon of a node."""
        self.run("slurmd", "-N", name)

    def kill_daemon(self, name: str) -> None:
        """Kill a daemon by its PID file."""
        with contextlib.suppress(OSError, ValueError):
            os.kill(int((self.folder / f"{name}.pid").read_text(encoding="utf-8")), signal.SIGKILL)

    def kill_node(self, name: str) -> None:
        """Kill a node as a power failure would: its daemon and all its processes at once."""
        for process in self._processes_of(name):
            with contextlib.suppress(psutil.Error):
                process.kill()

    def down(self) -> None:
        """End jobs and daemons, and remove the folder."""
        if not self.config.exists():
            raise UserError(f"{self.folder} holds no cluster: name the folder it was started in")
        with contextlib.suppress(UserError):
            everyone = ("--full", "--signal=KILL", "--state=RUNNING", f"--user={user()}")
            self.run("scancel", *everyone, timeout=20)
        for name in NODES:
            self.kill_node(name)
        for name in ("slurmctld", "munged"):
            self.kill_daemon(name)
        shutil.rmtree(self.folder, ignore_errors=True)

    def end_with(self, process: int) -> None:
        """Start a process that takes the cluster down as soon as another has ended in any way.

        Otherwise its jobs would be restarted forever.
        """
        words = [sys.executable, "-m", "slurm.devcluster", "down", self.folder, "--after", process]
        nothing = subprocess.DEVNULL
        subprocess.Popen(
            [str(word) for word in words], cwd=Path(__file__).parents[1], stdin=nothing,
            stdout=nothing, stderr=nothing, start_new_session=True,
        )  # fmt: skip

    def down_after(self, process: int) -> None:
        """Wait for the end of a process, then end the cluster and all processes of its folder."""
        while psutil.pid_exists(process):
            if not self.config.exists():
                return
            time.sleep(0.5)
        if self.config.exists():
            self.down()
        for other in psutil.process_iter(["cmdline"]):  # daemons that a test added
            if other.pid != os.getpid() and str(self.folder) in " ".join(
                other.info["cmdline"] or ()
            ):
                with contextlib.suppress(psutil.Error):
                    other.kill()

    def _write_config(self) -> None:
        controller, *ports = free_ports(1 + len(NODES))
        nodes = [
            f"NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs=8 "
            "RealMemory=8000 State=UNKNOWN"
            for name, port in zip(NODES, ports, strict=True)
        ]
        text = CONFIG.format(
            host=socket.gethostname(),
            controller=controller,
            user=user(),
            folder=self.folder,
            node_timeout_s=self.node_timeout_s,
            nodes="\n".join(nodes),
            names=",".join(NODES),
        )
        self.config.write_text(text, encoding="utf-8")

    def run(self, name: str, *words: str, timeout: float = 60) -> str:
        """Run one of Slurm's programs for this cluster; return its output, or raise UserError."""
        env = {**os.environ, **self.environment}
        return slurm_cli.call(_find(name) or name, *words, timeout=timeout, env=env)

    def wait_until_idle(self) -> None:
        """Wait until all nodes are idle; raise UserError after a minute."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(UserError):  # while the controller starts
                idle = ("--noheader", "--states=idle", "--partition=main", "--format=%D")
                if self.run("sinfo", *idle).strip() == str(len(NODES)):
                    return
            time.sleep(0.2)
        raise UserError(f"the nodes are not idle after a minute: see {self.folder}/*.log")

    def _processes_of(self, node: str) -> list[psutil.Process]:
        """Return a node's daemon and the processes it started, by their environment."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                variables, words = process.environ(), process.cmdline()
                if variables.get("SLURM_CONF") != str(self.config):
                    continue
                daemon = node in words and words[0].endswith(("slurmd", "slurmd-wlm"))
                if daemon or variables.get("SLURMD_NODENAME") == node:
                    found.append(process)
        return found


def missing_daemons() -> list[str]:
    """Return the programs that the cluster needs and that are not installed."""
    return [name for name in DAEMONS if _find(name) is None]


def user() -> str:
    """Return the name of the current user."""
    return pwd.getpwuid(os.geteuid()).pw_name


def _find(name: str) -> str | None:
    return shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


def free_ports(count: int) -> list[int]:
    """Return free ports."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def main() -> None:
    """Start or end the cluster."""
    parser = Parser(prog="python -m slurm.devcluster", description=__doc__)
    parser.add_argument("action", choices=("up", "down"))
    parser.add_argument("folder", type=Path, nargs="?", default=DEFAULT)
    parser.add_argument(
        "--after", type=int, help="down: wait until the process with this id has ended"
    )
    args = parser.parse_args()
    cluster = DevCluster(args.folder)
    if args.action == "up":
        cluster.up()
        print(f"four nodes are up; for Slurm's commands:  export SLURM_CONF={cluster.config}")
    elif args.after is not None:
        cluster.down_after(args.after)
    else:
        cluster.down()
        print("the four nodes are down")


if __name__ == "__main__":
    run_command(main)
