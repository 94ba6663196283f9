"""Clusters with accounting, and clusters that do not allow requeueing."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from accounting import WithAccounting, missing_programs
from cluster import Cluster, kill, until

from dgm.common.errors import UserError
from slurm import slurm_cli, status
from slurm.devcluster import DevCluster, missing_daemons

pytestmark = pytest.mark.slow

NO_REQUEUE = """
function slurm_job_submit(job, partitions, user)
    job.requeue = 0
    return slurm.SUCCESS
end
function slurm_job_modify(job, record, partitions, user)
    return slurm.SUCCESS
end
return slurm.SUCCESS
"""


class WithoutRequeue(DevCluster):
    """A cluster whose administrators remove `--requeue` from every job."""

    def start_controller(self) -> None:
        with open(self.config, "a") as file:
            file.write("JobSubmitPlugins=lua\n")
        (self.folder / "job_submit.lua").write_text(NO_REQUEUE)
        super().start_controller()


@pytest.fixture
def make_cluster(
    tmp_path: Path, tiny_config: Path, user_environment: dict[str, str], monkeypatch
) -> Iterator[Callable[..., Cluster]]:
    """Return a function that starts a cluster of some kind, which Slurm's commands then address."""
    with contextlib.ExitStack() as stack:

        def make(kind: type[DevCluster], missing: list[str]) -> Cluster:
            if missing:
                packages = "slurm-wlm munge slurmdbd mariadb-server-core mariadb-client-core"
                pytest.skip(f"{', '.join(missing)} missing: apt-get install {packages}")
            nodes = kind(tmp_path / "slurm")
            for name, value in {**user_environment, **nodes.environment}.items():
                monkeypatch.setenv(name, value)
            nodes.up()
            nodes.end_with(os.getpid())
            stack.callback(nodes.down)
            return Cluster(nodes, tiny_config)

        yield make


def processes_of(job: str) -> list[psutil.Process]:
    """Find what a job runs on all nodes, without Slurm's own processes."""
    found = []
    for process in psutil.process_iter(["name"]):
        with contextlib.suppress(psutil.Error):
            if process.environ().get("SLURM_JOB_ID") == job and process.name() != "slurmstepd":
                found.append(process)
    return found


@pytest.mark.long
def test_accounting_has_the_states_of_old_jobs(make_cluster: Callable, tmp_path: Path) -> None:
    accounted = make_cluster(WithAccounting, missing_daemons() + missing_programs())

    def wrap(*words: str) -> str:
        output = slurm_cli.call("sbatch", "--parsable", "--output=/dev/null", *words)
        return output.strip()

    run = accounted.submit(tmp_path / "run", steps=100_000)
    good, bad = wrap("--wrap=true"), wrap("--wrap=false")
    array = wrap("--array=0-3%1", "--wrap=sleep 100")
    tasks = [f"{array}_{number}" for number in range(4)]
    until(lambda: slurm_cli.is_running(f"{array}_0"), 30, "the array did not start")
    slurm_cli.cancel([array])
    accounted.wait_for_steps(run, 5)
    # The oldest first: the job must not record how its other processes ended.
    for process in sorted(processes_of(accounted.job(run)), key=lambda p: p.create_time()):
        kill(process)
    jobs = {good, bad, *tasks, accounted.job(run)}
    until(lambda: not any(s.live for s in slurm_cli.states(jobs).values()), 30, "jobs did not end")
    accounted.nodes.forget_jobs()
    assert slurm_cli.call("squeue", "--noheader", "--states=all") == ""
    names = {job: state.name for job, state in slurm_cli.states(jobs).items()}
    own = accounted.job(run)
    assert names == {good: "COMPLETED", bad: "FAILED", tasks[0]: "CANCELLED", own: "FAILED"}
    assert status.rows([run])[0].state == "failed"
    # Without accounting its end is unknown.
    accounted.nodes.kill_daemon("slurmdbd")
    assert slurm_cli.states(jobs) == {}
    assert status.rows([run])[0].state == "lost"


def test_cluster_that_never_requeues_is_refused_and_nothing_is_left(
    make_cluster: Callable, tmp_path: Path
) -> None:
    cluster = make_cluster(WithoutRequeue, missing_daemons())
    with pytest.raises(UserError, match=r"does not allow job \d+ .*requeued, .* it was cancelled"):
        cluster.submit(tmp_path / "run")
    # A job that began before it was cancelled stays in state COMPLETING for a moment.
    until(lambda: slurm_cli.call("squeue", "--noheader") == "", 30, "the job was not cancelled")
    assert not (tmp_path / "run").exists()
