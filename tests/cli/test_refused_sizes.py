"""Runs that do not fit, or that an engine refuses, leave no folder behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from optional import need

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
# Memory is limited once everything is imported, so that only the batch exceeds it.
BOUNDED = """
import resource, runpy, sys
sys.path.insert(0, ROOT)
import psutil, torch
import dgm.cli.assemble, torch.utils.tensorboard
del sys.argv[0]
limit = psutil.Process().memory_info().vms + 1500 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_a_batch_that_does_not_fit_leaves_no_folder_and_a_smaller_one_trains_there(
    run_script: Callable, run_warm: Callable, tiny_configs: dict[str, Path], tmp_path: Path
) -> None:
    bounded, run = tmp_path / "bounded.py", tmp_path / "run"
    bounded.write_text(BOUNDED.replace("ROOT", repr(str(LAUNCH.parent))))
    script = LAUNCH / "train_gan.py"
    words = [script, "--config", tiny_configs["gan"], "--run.dir", run, "--train.compile=none"]
    large = run_script(bounded, *words, "--train.global_batch=65536")
    assert large.code == 2, large.stderr
    error = large.stderr.splitlines()[-1]
    assert error.startswith("error: 65536 images at a time do not fit into the memory of cpu")
    assert "lower train.global_batch" in error
    assert not run.exists()
    small = run_warm(*words, "--train.global_batch=16", "--train.total_images=16")
    assert small.code == 0, small.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "zero", "message"),
    [
        ("--train.compile=all", "3", "lower zero_stage"),
        ("--train.float64=true", "2", "use one process or DDP"),
    ],
)
def test_what_an_engine_refuses_leaves_no_folder(
    run_warm: Callable, tiny_config: Path, tmp_path: Path, option: str, zero: str, message: str
) -> None:
    need("deepspeed")
    words = [LAUNCH / "train_ddpm.py", "--config", tiny_config, "--run.dir", tmp_path / "run"]
    done = run_warm(*words, option, zero=zero)
    assert done.code == 2 and message in done.stderr, (done.code, done.stderr)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("diffusion", ["--data.resize=33"], "images of side 33 do not divide by"),
        ("gan", ["--data.resize=48"], "the images are 48 x 48"),
        ("flow", ["--data.resize=31"], "images of 31 x 31 cannot be halved"),
        ("diffusion", ["--model.channels=40000"], "choose smaller numbers"),
        ("vae", ["--train.global_batch=10000000"], "train.global_batch is 10000000"),
    ],
)
def test_what_is_refused_for_its_images_or_settings_leaves_no_shards(
    run_warm: Callable,
    tiny_configs: dict[str, Path],
    shape_pictures: Path,
    tmp_path: Path,
    family: str,
    options: list[str],
    message: str,
) -> None:
    script = {"diffusion": "train_ddpm.py"}.get(family, f"train_{family}.py")
    words = ["--config", tiny_configs[family], "--run.dir", "run", "--data.shards=null"]
    source = f"--data.source=folder:{shape_pictures}"
    done = run_warm(LAUNCH / script, *words, source, *options, cwd=tmp_path)
    assert done.code == 2 and message in done.stderr, (done.code, done.stderr)
    assert not list(tmp_path.iterdir())
