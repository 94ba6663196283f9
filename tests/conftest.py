"""Fixtures: tiny shards, configurations and runs, and scripts run as a user runs them."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
import yaml
from interpreted import mend_interpreter
from optional import need
from PIL import Image
from processes import free_port, kill_all
from tiny import SCRIPTS, TINY
from warm_processes import Result, Warm, plain_environment

from dgm.training.engine import Engine
from shards import shapes
from shards.build import build

if TYPE_CHECKING:
    from cluster import Cluster

# Triton reads this when it is first imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

ROOT = Path(__file__).resolve().parents[1]
NUM_IMAGES = 320  # twenty steps of 16
DEEPSPEED = [
    "deepspeed.runtime.zero.muon.original_muon"
]  # DeepSpeed imports it at every start, slowly


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compute on one thread, as tests share the cores, and draw the same initial weights."""
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # engines respect it
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    """Return an engine of this process alone, whatever launched the tests."""
    for name in ("MASTER_ADDR", "RANK", "WORLD_SIZE", "LOCAL_RANK", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)
    return Engine("no")


@pytest.fixture
def kernel_device() -> str:
    """Return the device of Triton kernels: a GPU, or the CPU in the interpreter."""
    if torch.cuda.is_available():
        return "cuda"
    mend_interpreter()
    return "cpu"


@pytest.fixture(scope="session")
def shape_pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Draw a class-folder tree of shapes."""
    root = tmp_path_factory.mktemp("pictures")
    for index in range(NUM_IMAGES):
        folder = root / shapes.CLASSES[index % len(shapes.CLASSES)]
        folder.mkdir(exist_ok=True)
        Image.fromarray(shapes.render("train", index)).save(folder / f"{index:04d}.png")
    return root


@pytest.fixture(scope="session")
def tiny_shards(shape_pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build shards of the shapes: 320 images in four tars."""
    out = tmp_path_factory.mktemp("shards") / "train"
    build(f"folder:{shape_pictures}", "train", out, shard_size=90, progress=False)
    return out


@pytest.fixture(scope="session")
def tiny_configs(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write the configuration of each family's smallest run."""
    folder = tmp_path_factory.mktemp("config")
    paths = {family: folder / f"{family}.yaml" for family in TINY}
    for family, path in paths.items():
        data = {"shards": str(tiny_shards), "test_shards": str(tiny_shards)}
        path.write_text(yaml.safe_dump({**TINY[family], "data": data}))
    return paths


@pytest.fixture(scope="session")
def tiny_config(tiny_configs: dict[str, Path]) -> Path:
    """Return the configuration of a diffusion model's smallest run."""
    return tiny_configs["diffusion"]


@pytest.fixture(scope="session")
def user_environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the environment of a user without a GPU, with a cache shared by the session."""
    base = tmp_path_factory.getbasetemp()
    cache = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"
    return plain_environment(cache)


@pytest.fixture(scope="session")
def start_script(
    user_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., subprocess.Popen]:
    """Return a function that starts `python WORDS`, or `accelerate launch` on several processes.

    `engine` names a file of launch/configs/accelerate, `options` are further launcher options.
    """
    elsewhere = tmp_path_factory.mktemp("elsewhere")

    def start(
        *words: object,
        processes: int = 1,
        cwd: Path = elsewhere,
        engine: str | None = None,
        options: str = "--main_process_port 0",
        variables: dict[str, str] | None = None,
    ) -> subprocess.Popen:
        command = [sys.executable]
        if engine is not None and engine.startswith("zero"):
            need("deepspeed")
        if processes > 1:
            engines = ROOT / "launch" / "configs" / "accelerate"
            file = ROOT / "accelerate_config.yaml" if engine is None else engines / f"{engine}.yaml"
            command += ["-m", "accelerate.commands.launch", "--config_file", str(file)]
            command += f"--num_processes {processes} {options}".split()
            command += ["--multi_gpu"] if engine is None else []
        return subprocess.Popen(
            [*command, *map(str, words)],
            cwd=cwd,
            env={**user_environment, **(variables or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    return start


@pytest.fixture(scope="session")
def run_script(start_script: Callable[..., subprocess.Popen]) -> Callable[..., Result]:
    """Return a function that runs what `start_script` starts, and kills what is left of it."""

    def run(*words: object, timeout: float = 120, **options) -> Result:
        process = start_script(*words, **options)
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        finally:
            if process.poll() is None:
                kill_all(process)
                process.communicate()
        return Result(process.returncode, stdout, stderr)

    return run


@pytest.fixture(scope="session")
def warm(
    user_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Warm]]:
    """Return a function that starts a `Warm` with further modules, once for each list of these."""
    started: list[Warm] = []

    @functools.cache
    def start(*modules: str) -> Warm:
        started.append(Warm(tmp_path_factory.mktemp("warm"), user_environment, modules))
        return started[-1]

    yield start
    for each in started:
        each.close()


@pytest.fixture(scope="session")
def run_warm(
    warm: Callable[..., Warm], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Result]:
    """Return a function like that of `run_script`, whose processes need not import torch.

    `zero` is a stage of ZeRO, see `zero_environment`. The `code` of the result is the first exit
    code by rank that is not 0.
    """
    elsewhere = tmp_path_factory.mktemp("elsewhere")

    def run(
        *words: object,
        processes: int = 1,
        cwd: Path = elsewhere,
        timeout: float = 120,
        zero: str | None = None,
        variables: dict[str, str] | None = None,
    ) -> Result:
        if zero is not None:
            need("deepspeed")
        variables = (variables or {}) | ({} if zero is None else zero_environment(zero))
        output = tmp_path_factory.mktemp("output")
        ready = warm(*([] if zero is None else DEEPSPEED))
        return ready.start(words, output, cwd, processes, free_port(), variables).wait(timeout)

    return run


@pytest.fixture(scope="session")
def tiny_run(
    run_warm: Callable[..., Result],
    tiny_configs: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Path]:
    """Return a function from a family to its smallest run, trained on first use."""

    @functools.cache
    def train(family: str) -> Path:
        folder = tmp_path_factory.mktemp("trained") / family
        script = ROOT / "launch" / SCRIPTS[family]
        done = run_warm(script, "--config", tiny_configs[family], "--run.dir", folder)
        assert done.code == 0, done.stderr
        return folder

    return train


@pytest.fixture(scope="session")
def slurm_cluster(
    tmp_path_factory: pytest.TempPathFactory, tiny_config: Path, user_environment: dict[str, str]
) -> Iterator[Cluster]:
    """Yield a real Slurm cluster of four nodes on this machine."""
    need("submitit")
    from cluster import Cluster

    from slurm.devcluster import DevCluster, missing_daemons

    missing = missing_daemons()
    if missing:
        pytest.skip(f"{', '.join(missing)} missing: apt-get install slurm-wlm munge")
    nodes = DevCluster(tmp_path_factory.mktemp("cluster") / "slurm", node_timeout_s=10)
    patch = pytest.MonkeyPatch()
    for name, value in {**user_environment, **nodes.environment}.items():
        patch.setenv(name, value)
    nodes.up()
    nodes.end_with(os.getpid())
    yield Cluster(nodes, tiny_config)
    nodes.down()
    patch.undo()


@pytest.fixture
def cluster(slurm_cluster: Cluster) -> Iterator[Cluster]:
    """Yield the Slurm cluster, and cancel the jobs that a test leaves, a failed one for example."""
    yield slurm_cluster
    slurm_cluster.cancel_all()


def zero_environment(config: str) -> dict[str, str]:
    """Return the variables that `accelerate launch` sets for a ZeRO stage, such as `2_offload`."""
    stage, _, offload = config.partition("_")
    found = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": stage}
    if offload:
        found["ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE"] = "cpu"
        if stage == "3":
            found["ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE"] = "cpu"
    return found


def pytest_configure() -> None:
    """Restore SIGHUP, which nohup ignores, and SIGINT, which a shell ignores in the background."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the longest tests."""
    items.sort(key=lambda item: item.get_closest_marker("timeout") is None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    """Turn skips into failures if DGM_SKIP_IS_FAILURE is set: then nothing may be missing."""
    report = yield
    if not hasattr(report, "wasxfail"):
        _refuse_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Iterator[None]:
    """Turn skipped files into failures too."""
    report = yield
    _refuse_skip(report)
    return report


def _refuse_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if os.environ.get("DGM_SKIP_IS_FAILURE") and report.skipped:
        report.outcome = "failed"
        report.longrepr = f"skipped, but nothing may be missing here: {report.longrepr}"
