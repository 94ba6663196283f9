"""Kill runs for real, start the same command again, and compare with a run left in peace."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import SCRIPTS

HERE = Path(__file__).parent
LAUNCH = HERE.parents[1] / "launch"
TENSORS = ("model.safetensors", "ema.safetensors", "optimizer.safetensors")
STEPS, BATCH = 24, 16  # more than one pass over the 320 images
# Logs and saves seldom fall together, so that a run is continued between two logs.
CADENCE = (
    f"--train.total_images={STEPS * BATCH}",
    f"--train.log_every_images={3 * BATCH}",
    f"--train.save_every_images={4 * BATCH}",
    f"--train.sample_every_images={8 * BATCH}",
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def train(run_script: Callable, run_warm: Callable, tiny_configs: dict[str, Path]) -> Callable:
    """Return a trainer: into a folder, to its end or to the moment of a signal."""

    def run(folder: Path, moment: str | None = None, processes: int = 1, family: str = "diffusion"):
        driver = [] if moment is None else [HERE / "signal_at.py", moment]
        words = [LAUNCH / SCRIPTS[family], "--config", tiny_configs[family]]
        words = [*driver, *words, "--run.dir", folder, *CADENCE]
        return (run_warm if processes == 1 else run_script)(*words, processes=processes)

    return run


@pytest.fixture(scope="module")
def undisturbed_run(
    train: Callable, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Return a maker of a family's uninterrupted run on so many processes."""
    made: dict[tuple[int, str], Path] = {}

    def make(processes: int, family: str = "diffusion") -> Path:
        if (processes, family) not in made:
            folder = tmp_path_factory.mktemp("peace") / "run"
            done = train(folder, processes=processes, family=family)
            assert done.code == 0, done.stderr
            made[processes, family] = folder
        return made[processes, family]

    return make


def checkpoints(folder: Path) -> list[int]:
    """List the steps whose checkpoint has its final name."""
    names = [p.name for p in (folder / "checkpoints").glob("*") if p.name.isdigit()]
    return sorted(int(name) // BATCH for name in names)


def metrics(folder: Path) -> list[dict[str, float]]:
    """Read metrics.jsonl without times, memory and energy."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    measured = ("wall_s", "time/", "memory/", "energy/")
    return [{k: v for k, v in line.items() if not k.startswith(measured)} for line in lines]


def assert_same_run(folder: Path, peaceful: Path) -> None:
    """Compare final tensors and pictures byte for byte, and every line of the metrics."""
    last = f"checkpoints/{STEPS * BATCH:09d}"
    for name in TENSORS:
        assert (folder / last / name).read_bytes() == (peaceful / last / name).read_bytes(), name
    grids = sorted(path.name for path in (peaceful / "samples").iterdir())
    assert len([name for name in grids if "-" not in name]) == 3
    assert sorted(path.name for path in (folder / "samples").iterdir()) == grids
    for name in grids:
        ours, theirs = folder / "samples" / name, peaceful / "samples" / name
        assert ours.read_bytes() == theirs.read_bytes(), name
    assert [line["step"] for line in metrics(folder)] == list(range(3, STEPS + 1, 3))
    assert metrics(folder) == metrics(peaceful)
    assert not list((folder / "checkpoints").glob(".*")), "a partial checkpoint is left"


@pytest.mark.parametrize(
    ("moment", "saved", "logged"),
    [
        pytest.param("forward:15", [4, 8, 12], 4, id="between forward and backward of a step"),
        pytest.param("update:7", [4], 2, id="between a step and its moving average"),
        pytest.param("saved:2", [4, 8], 2, id="right after a save"),
        pytest.param("forward:2", [], 0, id="before anything was saved"),
    ],
)
def test_killed_run_continues_to_the_same_bytes(
    train: Callable,
    undisturbed_run: Callable,
    tmp_path: Path,
    moment: str,
    saved: list[int],
    logged: int,
) -> None:
    folder = tmp_path / "run"
    killed = train(folder, moment)
    assert killed.code == -signal.SIGKILL, killed.stderr
    assert checkpoints(folder) == saved
    assert len(metrics(folder)) == logged
    again = train(folder)
    assert again.code == 0, again.stderr
    assert any(line in again.stdout for line in ("continues at:", "already seen:")) == bool(saved)
    assert_same_run(folder, undisturbed_run(1))


LONG = [pytest.param(family, marks=pytest.mark.long) for family in ("vae", "flow")]


@pytest.mark.parametrize("family", ["gan", *LONG])
def test_every_family_killed_three_times_continues_to_the_same_bytes(
    train: Callable, undisturbed_run: Callable, tmp_path: Path, family: str
) -> None:
    folder = tmp_path / "run"
    # In a step, in the second file of a save, after a save; a GAN has a second pass in most steps.
    for moment in ("forward:11", "file:7", "saved:1"):
        killed = train(folder, moment, family=family)
        assert killed.code == -signal.SIGKILL, killed.stderr
    assert 8 <= checkpoints(folder)[-1] < STEPS
    again = train(folder, family=family)
    assert again.code == 0, again.stderr
    assert "continues at:" in again.stdout
    assert_same_run(folder, undisturbed_run(1, family))


def test_run_killed_at_every_file_of_a_save_continues_to_the_same_bytes(
    train: Callable, undisturbed_run: Callable, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    files: set[str] = set()
    # Each start passes one save of five files and dies in the next one, a file later each time.
    for k in range(1, 6):
        killed = train(folder, f"file:{5 + k}")
        assert killed.code == -signal.SIGKILL, killed.stderr
        assert checkpoints(folder)[-1] == 4 * k
        partial = folder / "checkpoints" / f".partial-{4 * (k + 1) * BATCH:09d}"
        files = {path.name for path in partial.iterdir()}
        assert len(files) == k
        assert f"continues at:    {4 * (k - 1) * BATCH:,} images" in killed.stdout or k == 1
    assert files == {*TENSORS, "state.json", "manifest.json"}
    again = train(folder)
    assert again.code == 0, again.stderr
    assert_same_run(folder, undisturbed_run(1))


def test_run_stopped_by_sigterm_exits_75_and_continues_to_the_same_bytes(
    train: Callable, undisturbed_run: Callable, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    stopped = train(folder, "term:7")
    assert stopped.code == 75, stopped.stderr
    assert "stopped and saved: run the same command to continue" in stopped.stdout.splitlines()
    assert checkpoints(folder) == [4, 7]  # saved where it stopped, between two logs
    assert len(metrics(folder)) == 2
    again = train(folder)
    assert again.code == 0, again.stderr
    assert "continues at:    112 images" in again.stdout.splitlines()
    assert_same_run(folder, undisturbed_run(1))


def test_two_processes_end_together_and_continue_to_the_same_bytes(
    train: Callable, undisturbed_run: Callable, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    killed = train(folder, "forward:7@1", processes=2)  # a hang would run into the timeout
    assert killed.code not in (0, 2, 75)
    assert checkpoints(folder) == [4]
    stopped = train(folder, "term:9@1", processes=2)
    assert stopped.code != 0  # accelerate's own, whatever the processes end with
    assert "continues at:    64 images" in stopped.stdout.splitlines()
    assert stopped.stdout.count("stopped and saved: run the same command to continue") == 1
    assert checkpoints(folder) == [8, 12, 13]
    again = train(folder, processes=2)
    assert again.code == 0, again.stderr
    assert "DDP on 2 processes" in again.stdout
    assert "continues at:    208 images" in again.stdout.splitlines()
    assert_same_run(folder, undisturbed_run(2))


def test_run_with_a_damaged_newest_checkpoint_continues_from_the_one_before(
    train: Callable, undisturbed_run: Callable, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(undisturbed_run(1), folder)
    newest = folder / "checkpoints" / f"{STEPS * BATCH:09d}"
    damaged = newest / "optimizer.safetensors"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    again = train(folder)
    assert again.code == 0, again.stderr
    warned = f"warning: checkpoint {newest} is skipped: optimizer.safetensors differs from"
    assert warned in again.stderr
    assert f"continues at:    {(STEPS - 4) * BATCH} images" in again.stdout.splitlines()
    assert_same_run(folder, undisturbed_run(1))
