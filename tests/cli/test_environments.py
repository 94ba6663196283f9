"""Unusual environments: no user name or home, launchers' variables, locales, thread counts."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from errors import error_of
from processes import free_port
from tiny import LAUNCH
from warm_processes import Warm

ROOT = LAUNCH.parent
SCRIPT = LAUNCH / "train_vae.py"
ACCELERATE = ["--config_file", str(ROOT / "accelerate_config.yaml")]
TWO = [*ACCELERATE, "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
BARE = ["-m", "accelerate.commands.launch"]

pytestmark = pytest.mark.slow

THREADS = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from dgm.training.process_settings import start_engine
os.sched_getaffinity = lambda _: set(range(4))  # on any machine
given = [int(word) for word in sys.argv[1:]]
engine = start_engine(threads=given[0] if given else None)
sys.stdout.write(f"threads {{torch.get_num_threads()}}\\n")  # in one write
engine.close()
"""


@pytest.fixture
def words(tiny_configs: dict[str, Path], tmp_path: Path) -> list[object]:
    """Return a command that trains for two steps."""
    words = [SCRIPT, "--config", tiny_configs["vae"], "--run.dir", tmp_path / "run"]
    return [*words, "--run.trackers=[]", "--train.total_images=32"]


def python(words: list[object], environment: dict, cwd: Path, *prefix: str):
    """Run `python WORDS`."""
    return subprocess.run(
        [*prefix, sys.executable, *map(str, words)], env=environment, cwd=cwd,
        capture_output=True, text=True, errors="replace", timeout=200,
    )  # fmt: skip


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "", "WORLD_SIZE": "", "LOCAL_RANK": "", "LOCAL_WORLD_SIZE": "",
         "SLURM_CPUS_PER_TASK": "", "OMP_NUM_THREADS": "", "MASTER_PORT": ""},
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_JOB_NODELIST": "n[1-4]",
         "SLURM_CPUS_PER_TASK": "2", "PMI_RANK": "0", "PMI_SIZE": "1"},
        {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0",
         "OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"},
    ],
    ids=["empty", "salloc without srun", "mpirun of one"],
)  # fmt: skip
def test_variables_of_other_launchers_are_ignored(train: Callable, variables: dict) -> None:
    done = train("--train.total_images=32", variables=variables)
    assert (done.code, "Traceback" in done.stderr) == (0, False), done.stderr


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"LOCAL_RANK": "abc"}, "LOCAL_RANK is 'abc'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({"OMP_NUM_THREADS": "many"}, "OMP_NUM_THREADS is 'many'"),
        ({"OMPI_COMM_WORLD_RANK": "x"}, "OMPI_COMM_WORLD_RANK is 'x'"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK is not set"),
        ({"RANK": "3"}, "RANK is 3, but WORLD_SIZE is not set"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but MASTER_ADDR is not set"),
    ],
)
def test_invalid_variables_are_named(
    train: Callable, tmp_path: Path, variables: dict, named: str
) -> None:
    error = error_of(train(variables=variables))
    assert error.startswith(f"error: {named}") and "unset" in error
    assert not (tmp_path / "run").exists()


def test_processes_that_mpirun_started_train_together(
    warm: Callable[..., Warm], words: list[object], tmp_path: Path
) -> None:
    mpi = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    mpi["MASTER_PORT"] = str(free_port())
    both = []
    for rank in ("0", "1"):
        own = {"OMPI_COMM_WORLD_RANK": rank, "OMPI_COMM_WORLD_LOCAL_RANK": rank}
        (tmp_path / rank).mkdir()
        both.append(warm().start(words, tmp_path / rank, tmp_path, variables=mpi | own))
    first, second = (process.wait(120) for process in both)
    assert (first.code, second.code) == (0, 0), (first, second)
    assert "DDP on 2 processes" in first.stdout


@pytest.fixture
def threads(tmp_path: Path) -> Path:
    """Return a script that prints the number of threads."""
    (tmp_path / "threads.py").write_text(THREADS)
    return tmp_path / "threads.py"


@pytest.mark.parametrize(("given", "omp", "found"), [([], "", 4), ([], "1", 1), (["3"], "1", 3)])
def test_the_number_of_threads_is_that_of_the_user(
    run_warm: Callable, threads: Path, given: list[str], omp: str, found: int
) -> None:
    done = run_warm(threads, *given, variables={"OMP_NUM_THREADS": omp})
    assert done.stdout == f"threads {found}\n", done


@pytest.mark.parametrize(
    ("options", "omp", "found"),
    [(ACCELERATE, {}, 4), (TWO, {}, 2), (TWO, {"OMP_NUM_THREADS": "1"}, 1)],
)
def test_the_number_of_threads_is_not_that_of_the_launcher(
    threads: Path, tmp_path: Path, user_environment: dict, options: list[str], omp: dict, found: int
) -> None:
    environment = {key: user_environment[key] for key in user_environment if "OMP_" not in key}
    done = python([*BARE, *options, threads], environment | omp, tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"threads {found}" in done.stdout, (done.stdout, done.stderr)


def as_nobody(words: list[object], environment: dict[str, str], cwd: Path):
    """Run `python WORDS` as a user id without a name, in a namespace."""
    made = ["unshare", "--user", "--map-user=54321", "--map-group=54321"]
    if subprocess.run([*made, "true"], capture_output=True).returncode != 0:
        pytest.xfail("this system allows no user namespaces")
    base = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return python(words, {**base, **environment}, cwd, *made)


def test_a_user_without_name_and_home_trains_with_a_cache_folder(
    words: list[object], user_environment: dict, tmp_path: Path
) -> None:
    words = [*words, "--train.compile=noise"]
    without = as_nobody(words, {}, tmp_path)
    assert without.returncode == 2, without.stderr
    line = without.stderr.splitlines()[-1]
    assert line.startswith("error: HOME is not set") and "set XDG_CACHE_HOME" in line, line
    cache = {"XDG_CACHE_HOME": user_environment["XDG_CACHE_HOME"]}
    done = as_nobody(words, cache, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "getpwuid" not in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "~").exists()


def test_a_machine_without_affinity_and_locks_trains(
    words: list[object], user_environment: dict, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "for name in ('sched_getaffinity', 'sched_setaffinity'):\n    delattr(os, name)\n"
        "sys.modules['fcntl'] = None\n"
    )
    environment = {**user_environment, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = python(words, environment, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "does not support locks (fcntl is unavailable)" in done.stderr


@pytest.mark.parametrize("locale", ["C", "ascii"])
def test_any_locale_works(
    locale: str, shape_pictures: Path, user_environment: dict, tmp_path: Path
) -> None:
    variables = {"LC_ALL": "C"}
    if locale == "ascii":
        variables |= {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    pictures = tmp_path / "pictures"
    for folder in shape_pictures.iterdir():
        os.makedirs(pictures, exist_ok=True)
        os.symlink(folder, os.fsencode(pictures) + b"/" + os.fsencode(f"{folder.name}-caf\u00e9"))

    def run(*words: object):
        environment = {**user_environment, **variables, "PYTHONPATH": str(ROOT)}
        return python([*words], environment, tmp_path)

    words = ["--source", "folder:pictures", "--split", "train", "--out", "built"]
    built = run("-m", "shards.build", *words)
    if locale == "ascii" and built.returncode == 2:  # the name is not text in such a locale
        assert built.stderr.startswith("error: ") and built.stderr.count("\n") == 1
        return
    assert built.returncode == 0, built.stderr
    config = ["--config", LAUNCH / "configs" / "vae_tiny.yaml", "--data.shards", "built"]
    config += ["--run.dir", "run", "--train.total_images=32", "--run.trackers=[]"]
    trained = run(SCRIPT, *config)
    assert trained.returncode == 0, trained.stderr
    for script in ("sample.py", "report.py"):
        done = run(LAUNCH / script, "run")
        assert done.returncode == 0, done.stderr
