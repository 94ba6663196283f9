"""The development cluster, as `make cluster-up` and `make cluster-down` start and end it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from slurm.devcluster import DevCluster, missing_daemons

ROOT = Path(__file__).parents[2]


@pytest.fixture
def call(tmp_path: Path):
    missing = missing_daemons()
    if missing:
        pytest.skip(f"{', '.join(missing)} missing: apt-get install slurm-wlm munge")

    def run(what: str, *more: str) -> subprocess.CompletedProcess:
        words = [sys.executable, "-m", "slurm.devcluster", what, "c", *more]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)

    yield run
    if (tmp_path / "c").exists():
        run("down")


def left_of(folder: Path) -> list[str]:
    words = [" ".join(p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"])]
    return [line for line in words if str(folder) in line]


def test_cluster_starts_and_stops_without_leftovers(call, tmp_path: Path) -> None:
    up = call("up")
    assert up.returncode == 0, up.stderr
    config = tmp_path / "c" / "slurm.conf"
    assert f"export SLURM_CONF={config}" in up.stdout
    environment = {**os.environ, **DevCluster(tmp_path / "c").environment}
    words = ["srun", "--nodes=4", "bash", "-c", "echo $SLURMD_NODENAME"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=30)
    assert sorted(done.stdout.split()) == ["n1", "n2", "n3", "n4"], done.stderr
    again = call("up")
    assert again.returncode == 2
    assert again.stderr.startswith("error: ") and "holds a cluster already" in again.stderr
    down = call("down")
    assert down.returncode == 0, down.stderr
    assert not (tmp_path / "c").exists()
    assert not left_of(tmp_path)
    nothing = call("down")
    assert nothing.returncode == 2 and "holds no cluster" in nothing.stderr


@pytest.mark.slow
def test_cluster_ends_with_its_owner(call, tmp_path: Path) -> None:
    assert call("up").returncode == 0
    owner = subprocess.Popen(["sleep", "600"])
    nodes = DevCluster(tmp_path / "c")
    nodes.end_with(owner.pid)
    words = ["sbatch", "--wrap", f"sleep 600 # {tmp_path}", f"--chdir={tmp_path}"]
    environment = {**os.environ, **nodes.environment}
    subprocess.run(words, env=environment, check=True, capture_output=True)
    time.sleep(2)
    assert nodes.config.exists()  # as long as it lives
    owner.kill()
    owner.wait()
    until = time.monotonic() + 30
    while left_of(tmp_path) and time.monotonic() < until:
        time.sleep(0.5)
    assert not left_of(tmp_path) and not nodes.folder.exists()
