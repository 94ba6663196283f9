"""Submit jobs to the cluster of four nodes and watch them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from tiny import BATCH, LAUNCH, SCRIPTS

from slurm import slurm_cli, status
from slurm.devcluster import DevCluster
from slurm.run_state import RunState

ROOT = LAUNCH.parent


class Cluster:
    """The cluster, and runs of the smallest diffusion model on it."""

    def __init__(self, nodes: DevCluster, config: Path):
        self.nodes, self.config = nodes, config

    def submit(
        self, folder: Path, *options: object, overrides: tuple[object, ...] = (), steps: int = 16
    ) -> RunState:
        """Submit a run of `steps` steps."""
        from slurm import submit  # imports submitit, which is optional

        words = [LAUNCH / SCRIPTS["diffusion"], "--config", self.config, "--cluster", "cpu"]
        words += ["--cpus-per-process", 1]
        words += ["--accelerate-config", ROOT / "accelerate_config.yaml", *options, "--"]
        words += ["--run.dir", folder, "--run.trackers=[]"]
        words += [f"--train.total_images={steps * BATCH}", *overrides]
        with (
            pytest.MonkeyPatch.context() as patch,
            contextlib.redirect_stdout(io.StringIO()) as output,
        ):
            patch.delenv("TRITON_INTERPRET", raising=False)  # that of the tests of kernels
            assert submit.main([str(word) for word in words]) == 0, output.getvalue()
        return RunState(folder)

    def wait(self, run: RunState, *states: str, timeout: float = 150) -> status.Row:
        """Wait until a run is in one of these states."""
        until = time.monotonic() + timeout
        while time.monotonic() < until:
            row = status.rows([run])[0]
            if row.state in states:
                return row
            assert row.state not in status.ENDED, f"{row}\n{log_of(run)}"
            time.sleep(0.3)
        pytest.fail(f"{row} after {timeout} s\n{log_of(run)}")

    def wait_for_steps(self, run: RunState, steps: int, timeout: float = 90) -> None:
        """Wait until a run has logged `steps` steps."""
        until = time.monotonic() + timeout
        while time.monotonic() < until:
            metrics = run.metrics()
            if metrics and metrics[-1]["step"] >= steps:
                return
            time.sleep(0.05)
        pytest.fail(f"{steps} steps were not made in {timeout} s\n{log_of(run)}")

    def ranks(self, run: RunState) -> list[psutil.Process]:
        """Find the training processes of a run, in order of rank."""
        found = {}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                variables = process.environ()
                if variables.get("DGM_RUN_FOLDER") == str(run.path) and "RANK" in variables:
                    found.setdefault(int(variables["RANK"]), process)
        return [found[rank] for rank in sorted(found)]

    def cancel_all(self) -> None:
        """Cancel all jobs, and wait until none is left."""

        def none_left() -> bool:
            jobs = slurm_cli.call("squeue", "--noheader", "--format=%A").split()
            if jobs:
                slurm_cli.cancel(jobs)
            return not jobs

        until(none_left, 60, "jobs are left")

    def job(self, run: RunState) -> str:
        """Return the job id of a run."""
        return run.job()["job"]

    def show(self, run: RunState, key: str) -> str:
        """Return a field of Slurm's description of a run's job."""
        output = slurm_cli.call("scontrol", "show", "job", "-o", self.job(run))
        return re.findall(rf"\b{key}=(\S*)", output)[0]


def log_of(run: RunState) -> str:
    """Read the log of a run, and what Slurm wrote beside it."""
    paths = [run.log, *run.folder.glob("*/submitit/*.out")]
    return "\n".join(f"{path}\n{path.read_text()}" for path in paths if path.exists())


def kill(process: psutil.Process, number: int = signal.SIGKILL) -> None:
    """Send a signal to a process that may have ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, number)


def losses_of(run: Path) -> list[float]:
    """Read the losses of a run, which has logged each step once."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["train/loss"] for line in lines]


def until(condition: Callable[[], bool], timeout: float, what: str) -> None:
    """Wait for a condition."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.1)
