"""Runs of another owner: files follow the umask, and errors name what may not be read."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from errors import error_of
from tiny import LAUNCH

ROOT = LAUNCH.parent
WITHOUT_RIGHTS = ROOT / "tests" / "support" / "without_rights.py"
ALICE = 12345  # the system has no name for it
SCRIPT = LAUNCH / "train_vae.py"

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")

SAVE = """
import sys
from pathlib import Path
import torch
from dgm.training.checkpoint import Checkpoint, write
tensors = {"net.weight": torch.zeros(3)}
write(Path(sys.argv[1]), 16, Checkpoint(tensors, tensors, tensors, {}), keep=1)
"""


@pytest.fixture
def shared(tiny_run: Callable[[str], Path], tmp_path: Path) -> Path:
    """Return a copy of a run that another user owns, writable for all."""
    run = tmp_path / "run"
    shutil.copytree(tiny_run("vae"), run)
    for path in (run, *run.rglob("*")):
        os.chown(path, ALICE, ALICE)
        path.chmod(0o777 if path.is_dir() else 0o666)
    return run


@pytest.mark.slow
def test_every_file_of_a_checkpoint_follows_the_umask(tmp_path: Path) -> None:
    words = [sys.executable, "-c", SAVE, str(tmp_path / "saved")]
    subprocess.run(words, cwd=ROOT, umask=0o002, check=True)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "saved").rglob("*.*")}
    assert len(modes) == 5 and set(modes.values()) == {0o664}, modes


def test_every_file_that_a_run_leaves_follows_the_umask(tiny_run: Callable[[str], Path]) -> None:
    umask = os.umask(0o022)
    os.umask(umask)
    files = [path for path in tiny_run("vae").rglob("*") if path.is_file()]
    odd = {
        str(p): oct(p.stat().st_mode) for p in files if p.stat().st_mode & 0o777 != 0o666 & ~umask
    }
    assert len(files) > 10 and not odd


@pytest.mark.slow
def test_every_command_names_the_file_of_a_run_that_may_not_be_read(
    run_warm: Callable, tiny_configs: dict[str, Path], shared: Path
) -> None:
    commands = {
        "sample": [LAUNCH / "sample.py", shared],
        "report": [LAUNCH / "report.py", shared],
        "evaluate": [LAUNCH / "evaluate.py", shared, "--metrics", "cost"],
        "train": [SCRIPT, "--config", tiny_configs["vae"], "--run.dir", shared],
        "status": [ROOT / "slurm" / "status.py", shared.parent],
    }
    affected = {
        "config.yaml": commands,
        "checkpoints": commands,
        "metrics.jsonl": ("report", "status"),
    }
    for name, names in affected.items():
        path = shared / name
        path.chmod(0)
        for command in names:
            error = error_of(run_warm(WITHOUT_RIGHTS, *commands[command]))
            mode = "-R a+rX" if path.is_dir() else "a+r"
            for part in (f"{path} may not be read", "owner uid 12345", f"run chmod {mode}"):
                assert part in error
        path.chmod(0o777 if path.is_dir() else 0o666)


def test_a_folder_above_a_run_that_may_not_be_entered_is_named(
    run_warm: Callable, shared: Path
) -> None:
    os.chown(shared.parent, ALICE, ALICE)
    shared.parent.chmod(0o700)
    for script in ("sample.py", "report.py"):
        done = run_warm(WITHOUT_RIGHTS, LAUNCH / script, shared)
        error = error_of(done)
        assert f"{shared.parent} may not be entered" in error
        assert f"chmod a+x {shared.parent}" in error


def test_a_run_whose_checkpoints_may_not_be_written_is_refused_before_it_trains(
    run_warm: Callable, tiny_configs: dict[str, Path], shared: Path
) -> None:
    saved = shared / "checkpoints"
    saved.chmod(0o755)
    words = [SCRIPT, "--config", tiny_configs["vae"], "--run.dir", shared, "--run.trackers=[]"]
    error = error_of(run_warm(WITHOUT_RIGHTS, *words, "--train.total_images=1000"))
    assert f"{saved} may not be written to" in error and f"chmod a+w {saved}" in error
