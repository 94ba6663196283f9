"""The session on a GPU, as far as a CPU can tell: budget, processes, mistakes, and a dry run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import warnings
from pathlib import Path

import psutil
import pytest
import torch

from dgm.benchmarks.processes import ROOT
from dgm.common.errors import UserError
from tests.gpu import machine
from tests.gpu.processes import CommandError, run_limited
from tests.gpu.schedule import Budget, Outcome, Part, limit_of, run_parts

SCRIPT = ROOT / "tests" / "gpu" / "run.py"
# Optionally also an interpreter as on GPU machines: Python 3.12 with torch 2.11, numpy 2.5.
PYTHONS = [sys.executable, *filter(None, [os.environ.get("DGM_PYTHON_2_11")])]


@pytest.fixture
def prepared(shape_pictures: Path, tmp_path: Path) -> Path:
    """Return a prepared folder: some pictures, a commit and a cache of Triton."""
    folder = tmp_path / "prepared"
    folder.mkdir()
    with tarfile.open(folder / "cifar.tar.gz", "w:gz") as tar:
        for picture in sorted(shape_pictures.rglob("*.png"))[:64]:
            tar.add(picture, Path("cifar", "train", picture.parent.name, picture.name))
    with tarfile.open(folder / "triton.tar.gz", "w:gz") as tar:
        tar.add(folder, "kernels", recursive=False)
    (folder / "commit.json").write_text('{"git_commit": "abc", "git_dirty": false}')
    return folder


def run_session(
    *words: object, python: str = sys.executable, timeout: float = 60,
    env: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    return subprocess.run(
        [python, SCRIPT, *map(str, words)], cwd=ROOT, capture_output=True, text=True,
        timeout=timeout, stdin=subprocess.DEVNULL, env=env,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(1000)  # it takes one to two minutes, with peers three
@pytest.mark.parametrize("python", PYTHONS)
def test_dry_run_keeps_its_budget_and_packs_its_results(
    python: str, prepared: Path, user_environment: dict[str, str], tmp_path: Path
):
    out, start = tmp_path / "out", time.monotonic()
    words = ["900", "--dry-run", "--out", out, "--prepared", prepared]
    done = run_session(*words, python=python, timeout=950, env=user_environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert time.monotonic() - start < 900
    assert sorted(path.name for path in out.iterdir()) == ["all.tar.gz", "summary.json"]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["git_commit"] == "abc"
    assert summary["parts"]["setup"]["detail"].endswith("Triton's cache filled")
    states = {name: part["state"] for name, part in summary["parts"].items()}
    assert states.pop("graphs") == "left out"
    peers = states.pop("peers")
    assert set(states.values()) == {"done"}, summary
    assert summary["checks"]["failed"] == 0 and summary["checks"]["passed"] >= 12
    with tarfile.open(out / "all.tar.gz") as tar:
        names = set(tar.getnames())
        tar.extractall(tmp_path / "all", filter="data")
    checks = json.loads((tmp_path / "all" / "checks.json").read_text())
    skipped = {name for name, one in checks.items() if one["state"] == "skipped"}
    assert skipped == {"no step waits for the GPU", "graphs equal eager"}
    assert {"checks.json", "ours-16.json", "noise.json", "training/metrics.jsonl"} <= names
    assert any(name.startswith("training/samples/") for name in names)
    assert "cifar" in (tmp_path / "all" / "training" / "config.yaml").read_text()
    assert not any("checkpoints" in name for name in names)
    ours = json.loads((tmp_path / "all" / "ours-16.json").read_text())["step"]
    assert ours["loops"]["ours"]["images_per_s"][0] > 0 and ours["profile"]["fractions"]
    assert summary["figures"]["ours, images/s at 16"] > 0
    if peers == "done":
        assert summary["figures"]["lucidrains, images/s at 16"] > 0
    assert done.stdout.strip().endswith("all.tar.gz")


@pytest.mark.slow
def test_a_session_that_is_stopped_packs_its_results(tmp_path: Path):
    words = [sys.executable, SCRIPT, "300", "--dry-run", "--out", tmp_path / "out"]
    process = subprocess.Popen(
        [*map(str, words)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "setup" in line:
            break
    started = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["parts"]["setup"]["state"] == "done"
    with tarfile.open(tmp_path / "out" / "all.tar.gz") as tar:
        assert "machine.txt" in tar.getnames()
    assert_dead([each.pid for each in started])


@pytest.mark.parametrize(
    "words, message",
    [
        (["soon"], "argument SECONDS: invalid float value: 'soon'; see run.py --help"),
        (["nan"], "--seconds is nan: give a number"),
        (["60"], "SECONDS is 60: give 128 or more, which setup, together, rate take"),
        (["560", "--out", "full"], "--out is full, which is not empty: name a new folder, or"),
        (
            ["560", "--out", "full/file"],
            "--out is full/file, which is not a folder: name another path",
        ),
    ],
)
def test_mistakes_are_reported_in_one_line(words: list[str], message: str, tmp_path: Path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    done = subprocess.run(
        [sys.executable, SCRIPT, *words], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.startswith(f"error: {message}"), done.stderr
    assert done.stderr.count("\n") == 1 and not done.stdout
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_dry_run_is_suggested(tmp_path: Path):
    done = run_session(560, "--out", tmp_path / "out")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ") and "--dry-run" in done.stderr
    assert not (tmp_path / "out").exists()


def refusal() -> str:
    with pytest.raises(UserError) as caught:
        machine.check_gpu()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Pretend that this machine has a GPU with bf16."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(machine, "driver", lambda: None)
    return monkeypatch


def test_a_gpu_needs_bf16(cuda: pytest.MonkeyPatch):
    machine.check_gpu()
    cuda.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert refusal().startswith("the GPU Tesla T4 has compute capability 7.5 and no bf16: use")


def test_no_gpu_is_distinguished_from_an_old_driver(cuda: pytest.MonkeyPatch):
    warning = ""

    def unavailable() -> bool:
        if warning:
            warnings.warn(warning, stacklevel=2)
        return False

    cuda.setattr(torch.cuda, "is_available", unavailable)
    assert refusal().startswith(
        "there is no GPU here: run this on a machine with one, or add --dry"
    )
    warning = "CUDA initialization: The NVIDIA driver is too old (found version 11040)"
    assert "needs CUDA 13.0, finds no GPU (CUDA init" in refusal() and "11040" in refusal()
    cuda.setattr(machine, "driver", lambda: "NVIDIA H100 with driver 535.1")
    assert "finds no GPU (NVIDIA H100 with driver 535.1; CUDA init" in refusal()
    cuda.setattr(torch.version, "cuda", None)
    assert "was built without CUDA" in refusal()


def test_later_parts_get_unused_time():
    parts = [Part(name, 100, 20, str) for name in "abc"]
    assert limit_of(parts[0], parts[1:], 300) == 100
    assert limit_of(parts[1], parts[2:], 290) == 190  # the first one left 90
    assert limit_of(parts[2], [], 30) == 30  # the others took longer
    assert limit_of(Part("essential", 100, 20, str, essential=True), parts, 250) == 250


def test_a_part_that_fails_or_does_not_fit_does_not_stop_the_others():
    now = time.monotonic()

    def fail(limit: float) -> str:
        raise CommandError("broken")

    parts = [
        Part("fails", 10, 5, fail),
        Part("too long", 100, 95, str),
        Part("cannot", 10, 5, str, lambda: "needs a GPU"),
        Part("works", 10, 5, lambda limit: f"in {limit:.0f} s"),
    ]
    found: dict[str, Outcome] = {}
    run_parts(parts, Budget(100, 10, now), found.__setitem__)
    assert {name: outcome.state for name, outcome in found.items()} == {
        "fails": "failed", "too long": "left out", "cannot": "left out", "works": "done",
    }  # fmt: skip
    assert found["fails"].detail == "broken" and found["cannot"].detail == "needs a GPU"
    assert found["too long"].detail == "90 s left, it takes 95"
    assert found["works"].detail == "in 90 s"  # its own ten, and what nothing else needs


ORPHANS = """
import subprocess, sys, time
sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
same, other = subprocess.Popen(sleep), subprocess.Popen(sleep, start_new_session=True)
print(same.pid, other.pid, flush=True)
time.sleep(600)
"""


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def assert_dead(pids: list[int]) -> None:
    ends = time.monotonic() + 5  # a killed process may take a moment to end
    while any(map(is_alive, pids)) and time.monotonic() < ends:
        time.sleep(0.05)
    assert not any(map(is_alive, pids))


def test_a_command_at_its_limit_is_killed_with_all_that_it_started(tmp_path: Path):
    log, start = tmp_path / "log.txt", time.monotonic()
    with pytest.raises(CommandError, match="stopped after its 2 s"):
        run_limited([sys.executable, "-c", ORPHANS], log, 2)
    assert time.monotonic() - start < 5
    pids = [int(word) for word in log.read_text().split()]
    assert len(pids) == 2
    assert_dead(pids)


def test_a_command_may_save_at_its_limit_and_its_failure_is_quoted(tmp_path: Path):
    log = tmp_path / "log.txt"
    saves = "trap 'echo saved; exit' TERM; echo begun; while true; do sleep 0.1; done"
    with pytest.raises(CommandError, match=r"stopped after its \d s: saved"):
        run_limited(["sh", "-c", saves], log, 2)
    with pytest.raises(CommandError, match="ended with code 3: no such thing"):
        run_limited(["sh", "-c", "echo no such thing; exit 3"], log, 5)
