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
from dgm.training.checkpoint import Checkpoint, FullState, write
tensors = {"net.weight": torch.zeros(3)}
write(Path(sys.argv[1]), 16, Checkpoint(FullState(tensors, tensors), tensors, {}), keep=1)
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


def listing(folder: Path) -> list[tuple[str, int]]:
    return sorted((str(path), path.stat().st_mtime_ns) for path in (folder, *folder.rglob("*")))


def assert_denied(done, path: Path, remedy: str = "chmod") -> None:
    lines = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
    assert done.code == 2 and len(lines) == 1, (done.code, done.stderr)
    for part in (f"error: {path} may not be read", "owner uid 12345", f"run {remedy}", "chgrp"):
        assert part in lines[0], lines[0]


@pytest.mark.slow
@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_every_file_of_a_checkpoint_follows_the_umask(tmp_path: Path, umask: int) -> None:
    words = [sys.executable, "-c", SAVE, str(tmp_path / "saved")]
    subprocess.run(words, cwd=ROOT, umask=umask, check=True)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "saved").rglob("*.*")}
    assert len(modes) == 5 and set(modes.values()) == {0o666 & ~umask}, modes


def test_every_file_that_a_run_leaves_follows_the_umask(tiny_run: Callable[[str], Path]) -> None:
    umask = os.umask(0o022)
    os.umask(umask)
    files = [path for path in tiny_run("vae").rglob("*") if path.is_file()]
    odd = {
        str(p): oct(p.stat().st_mode) for p in files if p.stat().st_mode & 0o777 != 0o666 & ~umask
    }
    assert len(files) > 10 and not odd


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "manifest.json", ""])
def test_a_checkpoint_that_may_not_be_read_is_neither_damaged_nor_skipped(
    run_warm: Callable, tiny_configs: dict[str, Path], shared: Path, name: str
) -> None:
    newest = max((shared / "checkpoints").iterdir())
    denied = newest / name
    denied.chmod(0)
    (shared / "config.yaml").touch()
    before = listing(shared / "checkpoints")
    words = ["--config", tiny_configs["vae"], "--run.dir", shared, "--run.trackers=[]"]
    recursive = "chmod -R a+rX" if denied.is_dir() else "chmod a+r"
    assert_denied(run_warm(WITHOUT_RIGHTS, SCRIPT, *words), denied, recursive)
    assert_denied(run_warm(WITHOUT_RIGHTS, LAUNCH / "sample.py", shared), denied, recursive)
    expected = ["--checkpoint", int(newest.name)]
    assert_denied(run_warm(WITHOUT_RIGHTS, LAUNCH / "sample.py", shared, *expected), denied)
    assert listing(shared / "checkpoints") == before
    # The remedy of the message helps.
    subprocess.run(["chmod", *recursive.split()[1:], denied], check=True)
    assert run_warm(WITHOUT_RIGHTS, LAUNCH / "sample.py", shared).code == 0


@pytest.mark.slow
def test_every_command_names_the_file_of_a_run_that_may_not_be_read(
    run_warm: Callable, tiny_configs: dict[str, Path], shared: Path
) -> None:
    train = [SCRIPT, "--config", tiny_configs["vae"], "--run.dir", shared, "--run.trackers=[]"]
    evaluate = [LAUNCH / "evaluate.py", shared, "--metrics", "cost"]
    status = [ROOT / "slurm" / "status.py", shared.parent]
    commands = {
        "sample": [LAUNCH / "sample.py", shared],
        "report": [LAUNCH / "report.py", shared],
        "evaluate": evaluate,
        "train": train,
        "status": status,
    }
    denied = {
        "config.yaml": ("sample", "report", "evaluate", "train", "status"),
        "metrics.jsonl": ("report", "status"),
        "checkpoints": ("sample", "report", "evaluate", "train", "status"),
    }
    for name, affected in denied.items():
        path = shared / name
        path.chmod(0)
        for command in affected:
            done = run_warm(WITHOUT_RIGHTS, *commands[command])
            assert_denied(done, path, "chmod -R a+rX" if path.is_dir() else "chmod a+r")
        path.chmod(0o777 if path.is_dir() else 0o666)


def test_a_folder_above_a_run_that_may_not_be_entered_is_named(
    run_warm: Callable, shared: Path
) -> None:
    os.chown(shared.parent, ALICE, ALICE)
    shared.parent.chmod(0o700)
    for script in ("sample.py", "report.py"):
        done = run_warm(WITHOUT_RIGHTS, LAUNCH / script, shared)
        assert done.code == 2 and "Traceback" not in done.stderr, done.stderr
        assert f"{shared.parent} may not be entered" in done.stderr, done.stderr
        assert f"chmod a+x {shared.parent}" in done.stderr


def test_a_run_whose_checkpoints_may_not_be_written_is_refused_before_it_trains(
    run_warm: Callable, tiny_configs: dict[str, Path], shared: Path
) -> None:
    saved = shared / "checkpoints"
    saved.chmod(0o755)
    words = [SCRIPT, "--config", tiny_configs["vae"], "--run.dir", shared, "--run.trackers=[]"]
    done = run_warm(WITHOUT_RIGHTS, *words, "--train.total_images=1000")
    assert done.code == 2 and f"{saved} may not be written to" in done.stderr, done.stderr
    assert f"chmod a+w {saved}" in done.stderr
