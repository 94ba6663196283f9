"""Runs that do not fit, or that an engine refuses, leave no folder behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from errors import error_of
from tiny import LAUNCH, SCRIPTS

pytestmark = pytest.mark.slow
# Memory is limited once everything is imported, so that only the batch exceeds it.
BOUNDED = """
import resource, runpy, sys
import psutil, torch
import dgm.cli.assemble, torch.utils.tensorboard
del sys.argv[0]
limit = psutil.Process().memory_info().vms + 1500 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_batch_that_does_not_fit_leaves_no_folder_and_a_smaller_one_trains_there(
    run_warm: Callable, train: Callable, tiny_configs: dict[str, Path], tmp_path: Path
) -> None:
    bounded, run = tmp_path / "bounded.py", tmp_path / "run"
    bounded.write_text(BOUNDED)
    words = [LAUNCH / SCRIPTS["gan"], "--config", tiny_configs["gan"], "--run.dir", run]
    options = ["--train.compile=none", "--train.global_batch=65536"]
    large = run_warm(bounded, *words, *options)
    assert large.code == 2, large.stderr
    error = large.stderr.splitlines()[-1]
    assert error.startswith("error: 65536 images at a time do not fit into the memory of cpu")
    assert "lower train.global_batch" in error
    assert not run.exists()
    small = train("--train.compile=none", "--train.total_images=16", family="gan")
    assert small.code == 0, small.stderr


def test_what_an_engine_refuses_leaves_no_folder(train: Callable, tmp_path: Path) -> None:
    done = train("--train.float64=true", family="diffusion", zero="2")
    assert done.code == 2 and "use one process or DDP" in done.stderr, (done.code, done.stderr)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("diffusion", ["--data.resize=33"], "the image side 33 is not divisible by"),
        ("vae", ["--train.global_batch=10000000"], "train.global_batch is 10000000"),
    ],
)
def test_what_is_refused_for_its_images_or_settings_leaves_no_shards(
    train: Callable, shape_pictures: Path, tmp_path: Path, family: str, options: list[str],
    message: str,
) -> None:  # fmt: skip
    source = ["--data.shards=null", f"--data.source=folder:{shape_pictures}"]
    assert message in error_of(train(*source, *options, family=family, cwd=tmp_path))
    assert not list(tmp_path.iterdir())
