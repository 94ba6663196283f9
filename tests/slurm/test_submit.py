"""Submitting: what is printed, what is refused, and that a refused submission leaves nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml
from cluster import Cluster, until
from optional import need
from tiny import BATCH, LAUNCH, SCRIPTS

need("submitit")

from dgm.common.errors import UserError
from slurm import preflight, slurm_cli, status, submit
from slurm.accelerate_env import read_accelerate
from slurm.resources import Resources
from slurm.run_state import RunState

ROOT = LAUNCH.parent
TRAINER = LAUNCH / SCRIPTS["diffusion"]

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("options", "sweep", "parts"),
    [
        (["--partition", "moon"], "", ["sbatch refuses", "Invalid partition name specified"]),
        (["--nodes", "3"], "", ["train.global_batch 16 cannot be divided among 3 processes"]),
        ([], "grid: {train.keep_checkpoints: [0, -1, 3]}",
         ["set keep_checkpoints=0: train.keep_checkpoints is 0", "1 other sets have errors"]),
    ],
)  # fmt: skip
def test_a_refused_submission_is_one_line_and_leaves_nothing(
    cluster: Cluster, tiny_config: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch,
    options: list[str], sweep: str, parts: list[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    jobs = slurm_cli.call("squeue", "--noheader", "--format=%i").split()
    words = [TRAINER, "--config", tiny_config, "--cluster", "cpu", *options]
    words += ["--accelerate-config", ROOT / "accelerate_config.yaml"]
    if sweep:
        Path("sweep.yaml").write_text(sweep)
        words += ["--sweep", "sweep.yaml"]
    with pytest.raises(UserError) as caught:
        submit.main([str(word) for word in [*words, "--", "--run.dir=runs"]])
    message = str(caught.value)
    assert "\n" not in message and all(part in message for part in parts), message
    assert not Path("runs").exists()
    after = slurm_cli.call("squeue", "--noheader", "--format=%i").split()
    assert not set(after) - set(jobs)  # jobs of other tests may have ended
    assert "sbatch: error" not in capsys.readouterr().err


def test_a_script_that_is_not_a_trainer_is_refused() -> None:
    with pytest.raises(UserError, match=r"sample\.py is not a trainer: choose launch/train_ddpm"):
        preflight.examine(str(LAUNCH / "sample.py"), {"": []}, [1], {}, build=False)


def test_options_that_the_engine_does_not_support_are_refused() -> None:
    zero = read_accelerate(LAUNCH / "configs" / "accelerate" / "zero2.yaml")
    words = ["--config", str(LAUNCH / "configs" / "ddpm_tiny.yaml"), "--train.float64=true"]
    with pytest.raises(UserError, match=r"train\.float64 is set, but ZeRO keeps fp32 weights"):
        preflight.examine(str(TRAINER), {"": words}, [2], zero, build=False)


def test_held_jobs_are_cancelled_and_submitted_again(cluster: Cluster, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text("grid:\n  run.seed: [0, 1]\n")
    # Held as it is submitted.
    profile = tmp_path / "held.yaml"
    profile.write_text("gpus_per_node: 0\nsbatch: {hold: true}\n")
    options = ["--sweep", sweep, "--cluster", profile]
    base = cluster.submit(tmp_path / "runs", *options)
    runs = status.find_runs(base.path)
    assert [row.state for row in status.rows(runs)] == ["held", "held"]
    old = [run.job()["job"] for run in runs]
    with pytest.raises(UserError, match=rf"run folder .* is in use by job {old[0]} \(PENDING\)"):
        cluster.submit(tmp_path / "runs", *options)
    cluster.submit(tmp_path / "runs", "--sweep", sweep, "--only-failed")
    for run in runs:
        cluster.wait(run, "done")
    assert not any(state.live for state in slurm_cli.states(set(old)).values())


def test_setup_srun_and_python_of_a_profile(cluster: Cluster, tmp_path: Path) -> None:
    # Like a container's command, the wrapper runs around the trainer and gets Slurm's signals.
    around = """bash -c 'echo "inside, after $SETUP"; "$0" "$@"; exit $?'"""
    profile = {
        "gpus_per_node": 0, "nodes": "2", "setup": ["export SETUP=its-modules"],
        "srun": ["--label"], "python": f"{around} {sys.executable}",
    }  # fmt: skip
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(profile))
    overrides = ("--train.save_every_images=0",)
    run = cluster.submit(tmp_path / "run", "--cluster", path, steps=10**5, overrides=overrides)
    cluster.wait_for_steps(run, 5)
    lines = run.log.read_text().splitlines()
    assert {f"{task}: inside, after its-modules" for task in (0, 1)} <= set(lines)
    slurm_cli.call("scancel", "--signal=USR2", cluster.job(run))
    until(lambda: run.history()[-1]["event"] == "end", 60, run.log.read_text())
    assert run.history()[-1]["verdict"] == "stopped"
    assert run.images_saved() == run.metrics()[-1]["images_seen"]
    # A job that is cancelled just before it asks to be requeued would begin again.
    cluster.wait(run, "requeued")
    slurm_cli.cancel([cluster.job(run)])


def test_dry_run_prints_the_script_and_writes_nothing(
    cluster: Cluster, tiny_config: Path, tmp_path: Path, capsys
) -> None:
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text("grid:\n  optim.lr: [1e-3, 2e-3]\n")
    words = [TRAINER, "--config", tiny_config, "--cluster", "cpu", "--sweep", sweep, "--dry-run"]
    words += ["--nodes", "2-4", "--time", "30", "--account", "us", "--max-parallel", "1"]
    words += ["--accelerate-config", ROOT / "accelerate_config.yaml"]
    words += ["--", "--run.dir", tmp_path / "runs"]
    assert submit.main([str(word) for word in words]) == 0
    out = capsys.readouterr().out
    for line in (
        "#SBATCH --nodes=2-4", "#SBATCH --time=30", "#SBATCH --account=us", "#SBATCH --requeue",
        "#SBATCH --array=0-1%1", "#SBATCH --signal=B:USR2@120", "#SBATCH --open-mode=append",
        f"run folder:  {tmp_path}/runs/lr=0.001", f"run folder:  {tmp_path}/runs/lr=0.002",
        "processes:   2, 4", "# task 1: lr=0.002",
    ):  # fmt: skip
        assert line in out.splitlines(), line
    assert "train_ddpm.py --config" in out
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def start(
    user_environment: dict[str, str], tiny_config: Path, tmp_path: Path
) -> Callable[..., subprocess.Popen]:
    """Return a function that submits in another process, in its own folder and session."""

    def start(*options: object, overrides: tuple[str, ...] = (), **environment: str):
        words = [sys.executable, "-m", "slurm.submit", TRAINER, "--config", tiny_config]
        words += ["--accelerate-config", ROOT / "accelerate_config.yaml", *options]
        return subprocess.Popen(
            [str(word) for word in [*words, "--", *overrides]],
            env={**user_environment, "PYTHONPATH": str(ROOT), **environment}, cwd=tmp_path,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
            # A shell in the background ignores Ctrl-C, and its children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip

    return start


def test_a_machine_without_slurm_is_an_error(start: Callable, tmp_path: Path) -> None:
    submitter = start(PATH=str(tmp_path))
    _, err = submitter.communicate(timeout=60)
    assert submitter.returncode == 2
    (line,) = err.splitlines()
    assert line.startswith("error: there is no Slurm on this machine") and "local" in line
    assert not list(tmp_path.iterdir())


def test_a_local_sweep_runs_the_same_jobs(start: Callable, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text("sets:\n  good: {}\n  bad: {train.ema_halflife_images: 100}\n")
    (tmp_path / "runs" / "bad").mkdir(parents=True)
    (
        tmp_path / "runs" / "bad" / "something"
    ).touch()  # the trainer refuses a folder that is not empty
    options = ["--cluster", "local", "--processes-per-node", 2, "--max-parallel", 1]
    submitter = start(*options, "--sweep", sweep, overrides=("--run.dir=runs",))
    out, err = submitter.communicate(timeout=120)
    assert submitter.returncode == 2, err
    assert "done: runs/good" in out.splitlines()
    assert "failed: runs/bad: error: run.dir runs/bad is not empty" in out
    good = RunState(tmp_path / "runs" / "good")
    assert good.images_saved() == 16 * BATCH
    starts = (good.path / "starts.jsonl").read_text().splitlines()
    assert json.loads(starts[0])["engine"] == "DDP on 2 processes"
    assert (good.folder / "command.txt").read_text().endswith("slurm/config.yaml\n")
    kept = yaml.safe_load((good.folder / "config.yaml").read_text())
    assert kept["run"]["dir"] == "runs/good"
    code = list((tmp_path / "runs" / "slurm").glob("*/code/snapshot.json"))
    assert json.loads(code[0].read_text())["git_commit"]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGHUP])
def test_signals_to_a_local_submission_save_its_runs(
    start: Callable, tmp_path: Path, signum: int
) -> None:
    overrides = ("--run.dir=run", "--train.total_images=100000000", "--train.save_every_images=0")
    submitter = start("--cluster", "local", "--gpus-per-node", 0, overrides=overrides)
    run = RunState(tmp_path / "run")
    until(lambda: bool(run.metrics()), 90, "the run did not start")
    os.killpg(submitter.pid, signum)
    out, err = submitter.communicate(timeout=60)
    assert submitter.returncode == 75, err
    assert out.splitlines()[-1] == "stopped: run"
    assert run.images_saved() == run.metrics()[-1]["images_seen"]
    assert not psutil.pid_exists(run.job()["pid"])


def test_debug_runs_the_trainer_in_this_process(start: Callable, tmp_path: Path) -> None:
    submitter = start("--cluster", "debug", "--gpus-per-node", 0, overrides=("--run.dir=run",))
    _, err = submitter.communicate(timeout=120)
    assert submitter.returncode == 0, err
    assert RunState(tmp_path / "run").images_saved() == 16 * BATCH


def plan(run: Path, checkpoint_bytes: int = 0) -> preflight.Plan:
    config = {"train": {"keep_checkpoints": 3, "global_batch": 16, "total_images": 100}}
    return preflight.Plan("", run, config, (1,), checkpoint_bytes, "")


def test_a_lead_shorter_than_a_save_is_refused(tmp_path: Path) -> None:
    lines = [
        {"step": 1, "images_seen": 16, "time/images_per_s": 8.0, "time/save_s": 50.0},
        {"step": 2, "images_seen": 32, "time/images_per_s": 8.0, "time/save_s": 40.0,
         "time/sample_s": 20.0},
    ]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    err = preflight.check_lead([plan(tmp_path)], Resources(lead_s=120))
    assert "have taken 72.0 s" in err  # a step takes 2 s
    with pytest.raises(UserError, match=r"--lead-s is 60, .* 72\.0 s: choose 145 or more"):
        preflight.check_lead([plan(tmp_path)], Resources(lead_s=60))
    assert "no save has been timed" in preflight.check_lead([plan(tmp_path / "new")], Resources())


def test_too_little_disk_space_is_refused(tmp_path: Path) -> None:
    assert "0.00 GB of" in preflight.check_disk([plan(tmp_path / "a", 1000)])
    with pytest.raises(UserError, match=r"checkpoints need \d+\.\d GB, but .* free"):
        preflight.check_disk([plan(tmp_path / "a", 10**15)])


def test_a_folder_that_nodes_do_not_see_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    resources = Resources(gpus_per_node=0)
    assert "sees the run folder" in preflight.check_nodes([tmp_path], resources)
    with pytest.raises(UserError, match=r"node \S+ does not see \S+/nowhere: put it on a disk"):
        preflight.check_nodes([tmp_path, tmp_path / "nowhere"], resources)
    assert os.environ["SLURM_CONF"] == str(cluster.nodes.config)
