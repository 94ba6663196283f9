"""Train on a real Slurm cluster of four nodes: the same curve in spite of faults."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from cluster import Cluster, kill, log_of, losses_of, until
from tiny import BATCH, LAUNCH, SCRIPTS

from slurm import slurm_cli, status
from slurm.run_state import RunState

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

KILLS = int(os.environ.get("DGM_KILLS", "3"))
LONG = max(150, 15 * KILLS)  # steps: some seconds, so that a fault can be injected
TWO_NODES = ("--nodes", "2")
SAVES = ("--train.save_every_images=320",)


@pytest.fixture(scope="module")
def undisturbed(
    run_warm: Callable, tiny_config: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Train the long run on two processes without a fault, and return its folder."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    words = [LAUNCH / SCRIPTS["diffusion"], "--config", tiny_config, "--run.dir", folder]
    words += ["--run.trackers=[]", f"--train.total_images={LONG * BATCH}", *SAVES]
    done = run_warm(*words, processes=2)
    assert done.code == 0, done.stderr
    return folder


def same_bytes(run: RunState, undisturbed: Path) -> None:
    for name in ("model.safetensors", "ema.safetensors", "optimizer.safetensors"):
        path = f"checkpoints/{LONG * BATCH:09d}/{name}"
        assert (run.path / path).read_bytes() == (undisturbed / path).read_bytes(), name
    assert losses_of(run.path) == losses_of(undisturbed)


def ends(run: RunState) -> list[tuple[str, str]]:
    return [(line["verdict"], line["next"]) for line in run.history() if line["event"] == "end"]


@pytest.mark.parametrize(
    ("nodes", "processes", "engine"),
    [
        (2, 2, None),  # one process on each node is compared by bytes below
        pytest.param(2, 1, "zero2", marks=pytest.mark.long),
    ],
)
def test_several_nodes_have_the_losses_of_one_process(
    cluster: Cluster,
    losses_alone: Callable,
    largest_difference: Callable,
    tmp_path: Path,
    nodes: int,
    processes: int,
    engine: str | None,
) -> None:
    options: list[object] = ["--nodes", nodes, "--processes-per-node", processes]
    if engine:
        options += ["--accelerate-config", LAUNCH / "configs" / "accelerate" / f"{engine}.yaml"]
    run = cluster.submit(tmp_path / "run", *options, steps=25)
    row = cluster.wait(run, "done")
    assert row.processes == nodes * processes
    difference = largest_difference(losses_of(run.path), losses_alone("diffusion"))
    print(f"{nodes} nodes x {processes}, {engine or 'ddp'}: differs by {difference:.1e}")
    assert difference < 1e-5
    name = "DeepSpeed ZeRO-2" if engine else "DDP"
    assert f"engine:          {name} on {nodes * processes} processes" in log_of(run)


@pytest.mark.long
def test_array_trains_two_sets_at_a_time(cluster: Cluster, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text("grid:\n  optim.lr: [1e-3, 2e-3]\n  run.seed: [0, 1]\n")
    base = cluster.submit(tmp_path / "runs", "--sweep", sweep, "--max-parallel", 2, steps=60)
    runs = status.find_runs(base.path)
    names = [f"lr=0.00{lr}-seed={seed}" for lr in (1, 2) for seed in (0, 1)]
    assert [run.path.name for run in runs] == names
    seen: set[tuple[str, ...]] = set()
    ports: dict[Path, str] = {}

    def look() -> bool:
        for run in runs:
            for rank in cluster.ranks(run):
                with contextlib.suppress(psutil.Error):  # it may have ended since
                    ports[run.path] = rank.environ()["MASTER_PORT"]
        found = status.rows(runs)
        assert all(row.total_images == 60 * BATCH for row in found)
        assert all(row.images_seen == row.total_images for row in found if row.state == "done")
        seen.add(tuple(row.state for row in found))
        return all(row.state == "done" for row in found)

    until(look, 120, "the array did not end")
    assert all(states.count("running") <= 2 for states in seen)
    assert ("running", "running", "queued", "queued") in seen
    assert {state for states in seen for state in states} == {"queued", "running", "done"}
    assert len(set(ports.values())) == 4, "tasks of an array had the same port"
    for run in runs:
        assert len(losses_of(run.path)) == 60
        assert (run.folder / "config.yaml").is_file()


def test_a_stopped_run_saves_and_continues_by_itself(
    cluster: Cluster, undisturbed: Path, tmp_path: Path
) -> None:
    run = cluster.submit(tmp_path / "run", *TWO_NODES, steps=LONG, overrides=SAVES)
    # First before the trainer has its handler, through the job, as at a time limit.
    until(lambda: len(cluster.ranks(run)) == 2, 30, log_of(run))
    slurm_cli.call("scancel", "--batch", "--signal=USR2", cluster.job(run))
    until(lambda: bool(ends(run)), 30, log_of(run))
    assert cluster.wait(run, "requeued").requeues == 0
    # Then during training, every process.
    cluster.wait_for_steps(run, run.images_saved() // BATCH + 30)
    requested_at = run.metrics()[-1]["step"]
    slurm_cli.call("scancel", "--signal=USR2", cluster.job(run))
    until(lambda: len(ends(run)) == 2, 30, log_of(run))
    saved = run.images_saved() // BATCH
    assert saved >= requested_at
    assert run.metrics()[-1]["step"] == saved  # the step in progress, and none is lost
    row = cluster.wait(run, "done")
    assert row.requeues == 2
    stopped = ("stopped", "requeue")
    assert ends(run) == [stopped, stopped, ("done", "nothing")]
    same_bytes(run, undisturbed)


@pytest.mark.long
def test_a_preempted_run_saves_and_continues(
    cluster: Cluster, undisturbed: Path, tmp_path: Path
) -> None:
    run = cluster.submit(tmp_path / "run", *TWO_NODES, steps=LONG, overrides=SAVES)
    cluster.wait_for_steps(run, 30)
    urgent = ("--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null")
    slurm_cli.call("sbatch", *urgent, "--wrap=true")
    assert cluster.wait(run, "requeued").images_seen < LONG * BATCH
    row = cluster.wait(run, "done")
    assert ends(run) == [("stopped", "requeue"), ("done", "nothing")]
    assert row.requeues == 1
    same_bytes(run, undisturbed)


@pytest.mark.long
def test_a_run_continues_after_its_time_limit(cluster: Cluster, tmp_path: Path) -> None:
    # Slurm counts in minutes, and checks limits now and then.
    steps = 100_000
    options = ["--time", "1", "--lead-s", "40"]
    overrides = ("--train.log_every_images=320", "--train.save_every_images=0")
    run = cluster.submit(tmp_path / "run", *options, steps=steps, overrides=overrides)
    # Where imports are slow, the first start may be stopped before its first step.
    until(lambda: bool(ends(run)) and run.images_saved() > 0, 150, log_of(run))
    assert set(ends(run)) == {("stopped", "requeue")}
    saved = run.images_saved()
    row = cluster.wait(run, "running")

    def trained() -> bool:
        # A start may have time for one step only, and log nothing.
        seen = [line["images_seen"] for line in run.metrics()]
        return max([*seen, run.images_saved()]) > saved

    until(trained, 90, log_of(run))
    assert status.rows([run])[0].requeues >= 1 and row.total_images == steps * BATCH
    slurm_cli.cancel([cluster.job(run)])
    until(lambda: status.rows([run])[0].state in status.ENDED, 60, log_of(run))
    # Cancelled by a user: saved, and not started again.
    assert status.rows([run])[0].state in ("stopped", "cancelled")
    assert cluster.show(run, "JobState") == "CANCELLED"


@pytest.mark.long
def test_a_run_with_killed_ranks_ends_with_the_same_bytes(
    cluster: Cluster, undisturbed: Path, tmp_path: Path
) -> None:
    chance = random.Random(0)
    overrides = ("--train.save_every_images=80",)
    run = cluster.submit(tmp_path / "run", *TWO_NODES, steps=LONG, overrides=overrides)
    between, ports = LONG // (KILLS + 1), set()
    for number in range(KILLS):
        # At a random step of each part of the run.
        cluster.wait_for_steps(run, number * between + chance.randrange(6, between))
        victims = cluster.ranks(run)
        ports.add(victims[0].environ()["MASTER_PORT"])
        kill(chance.choice(victims))
        until(lambda number=number: len(ends(run)) > number, 60, log_of(run))
    row = cluster.wait(run, "done")
    assert ends(run) == [("fault", "again")] * KILLS + [("done", "nothing")]
    assert row.requeues == 0 and len(ports) == KILLS
    assert re.search(r"task [01]: Killed", log_of(run))
    print(f"{KILLS} kills: the same bytes")
    same_bytes(run, undisturbed)


@pytest.mark.long
def test_a_run_that_loses_two_of_four_nodes_continues_on_two(
    cluster: Cluster, run_warm: Callable, largest_difference: Callable, tmp_path: Path
) -> None:
    # With this learning rate, rounding differences between numbers of processes do not grow.
    overrides = (*SAVES, "--optim.lr=1e-4")
    run = cluster.submit(tmp_path / "run", "--nodes", "2-4", steps=LONG, overrides=overrides)
    cluster.wait_for_steps(run, 30)
    for node in ("n3", "n4"):
        cluster.nodes.kill_node(node)
    died = time.monotonic()
    try:
        row = cluster.wait(run, "done")
        print(f"two nodes died: done {time.monotonic() - died:.0f} s later")
        starts = [line for line in run.history() if line["event"] == "start"]
        assert starts[0]["nodes"] == ["n1", "n2", "n3", "n4"]
        assert starts[-1]["nodes"] == ["n1", "n2"] and row.requeues >= 1
    finally:
        for node in ("n3", "n4"):
            cluster.nodes.start_node(node)
        cluster.nodes.wait_until_idle()
    alone = tmp_path / "alone"
    words = [LAUNCH / SCRIPTS["diffusion"], "--config", run.path / "config.yaml"]
    assert run_warm(*words, "--run.dir", alone).code == 0
    difference = largest_difference(losses_of(run.path), losses_of(alone))
    print(f"4 nodes, then 2: differs by {difference:.1e} from one process")
    assert difference < 1e-5


def test_run_that_always_fails_is_given_up(cluster: Cluster, tmp_path: Path) -> None:
    options = ["--max-faults", "1"]
    run = cluster.submit(tmp_path / "run", *options, overrides=("--train.save_every_images=0",))
    until(lambda: len(cluster.ranks(run)) == 1, 30, log_of(run))
    kill(cluster.ranks(run)[0])
    until(lambda: bool(ends(run)), 30, log_of(run))
    assert ends(run) == [("fault", "give up")]
    until(lambda: status.rows([run])[0].state == "failed", 30, log_of(run))
    row = status.rows([run])[0]
    assert re.search(r"task 0: Killed", row.error), row.error
    kept = status.rows([run])[0].job
    cluster.submit(tmp_path / "run", "--only-failed")
    row = cluster.wait(run, "done")
    assert row.job != kept and row.error == ""


def test_a_compiler_survives_signals_to_a_step(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Clusters that keep a step in a cgroup signal every process in it.
    monkeypatch.setenv("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
    overrides = ("--train.compile=noise",)
    run = cluster.submit(tmp_path / "run", steps=100_000, overrides=overrides)

    def compiler_was_signaled() -> bool:
        for process in psutil.process_iter(["name"]):
            with contextlib.suppress(psutil.Error):  # it may have ended since
                is_compiler = process.info["name"] == "cc1plus"
                if is_compiler and process.environ().get("DGM_RUN_FOLDER") == str(run.path):
                    process.send_signal(signal.SIGUSR2)
                    return True
        return False

    until(compiler_was_signaled, 90, log_of(run))
    cluster.wait_for_steps(run, 5)
    assert "warning: " not in log_of(run)
    for rank in cluster.ranks(run):
        kill(rank, signal.SIGUSR2)
    until(lambda: bool(ends(run)), 60, log_of(run))
    assert ends(run) == [("stopped", "requeue")]
    assert run.images_saved() == run.metrics()[-1]["images_seen"]
    slurm_cli.cancel([cluster.job(run)])
