"""Kill runs, start the same command again, and compare with an undisturbed run."""

from __future__ import annotations

import filecmp
import functools
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import BATCH, LAUNCH, SCRIPTS

from tests.drills.run_contents import TENSORS, assert_same_tensors, metrics, named_checkpoints

SIGNAL_AT = Path(__file__).with_name("signal_at.py")
STEPS = 24  # more than one pass over the 320 images
# Logs and saves seldom coincide, so that a run is resumed between two logs.
CADENCE = (
    f"--train.total_images={STEPS * BATCH}",
    f"--train.log_every_images={3 * BATCH}",
    f"--train.save_every_images={4 * BATCH}",
    f"--train.sample_every_images={8 * BATCH}",
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def train(run_warm: Callable, tiny_configs: dict[str, Path]) -> Callable:
    """Return a function that trains into a folder, to the end or to the moment of a signal."""

    def run(folder: Path, moment: str | None = None, processes: int = 1, family: str = "diffusion"):
        driver = [] if moment is None else [SIGNAL_AT, moment]
        words = [LAUNCH / SCRIPTS[family], "--config", tiny_configs[family]]
        words = [*driver, *words, "--run.dir", folder, *CADENCE]
        done = run_warm(*words, processes=processes)
        assert moment or done.code == 0, done.stderr
        return done

    return run


@pytest.fixture(scope="module")
def undisturbed_run(
    train: Callable, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Return a function that trains a family's uninterrupted run once."""

    @functools.cache
    def make(processes: int = 1, family: str = "diffusion") -> Path:
        folder = tmp_path_factory.mktemp("undisturbed") / "run"
        train(folder, processes=processes, family=family)
        return folder

    return make


def saved_steps(folder: Path) -> list[int]:
    return [int(path.name) // BATCH for path in named_checkpoints(folder)]


def assert_same_run(folder: Path, undisturbed: Path) -> None:
    """Compare final tensors and pictures byte for byte, and every line of the metrics."""
    assert_same_tensors(folder, undisturbed)
    grids = sorted(path.name for path in (undisturbed / "samples").iterdir())
    assert len([name for name in grids if "-" not in name]) == 3
    assert sorted(path.name for path in (folder / "samples").iterdir()) == grids
    same = filecmp.cmpfiles(folder / "samples", undisturbed / "samples", grids, shallow=False)
    assert same == (grids, [], [])
    assert [line["step"] for line in metrics(folder)] == list(range(3, STEPS + 1, 3))
    assert metrics(folder) == metrics(undisturbed)
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
    assert saved_steps(folder) == saved
    assert len(metrics(folder)) == logged
    again = train(folder)
    assert any(line in again.stdout for line in ("continues at:", "already seen:")) == bool(saved)
    assert_same_run(folder, undisturbed_run())


LONG = [pytest.param(family, marks=pytest.mark.long) for family in ("vae", "flow")]


@pytest.mark.parametrize("family", ["gan", *LONG])
def test_every_family_killed_three_times_continues_to_the_same_bytes(
    train: Callable, undisturbed_run: Callable, tmp_path: Path, family: str
) -> None:
    folder = tmp_path / "run"
    # In a step (a GAN has a second pass in every other one); in a save, after two of its five
    # files, as file 7 is in the second save of that start; after a save.
    for moment in ("forward:11", "file:7", "saved:1"):
        killed = train(folder, moment, family=family)
        assert killed.code == -signal.SIGKILL, killed.stderr
    assert 8 <= saved_steps(folder)[-1] < STEPS
    again = train(folder, family=family)
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
        assert saved_steps(folder)[-1] == 4 * k
        partial = folder / "checkpoints" / f".partial-{4 * (k + 1) * BATCH:09d}"
        files = {path.name for path in partial.iterdir()}
        assert len(files) == k
        assert f"continues at:    {4 * (k - 1) * BATCH:,} images" in killed.stdout or k == 1
    assert files == {*TENSORS, "state.json", "manifest.json"}
    train(folder)
    assert_same_run(folder, undisturbed_run())


def test_run_stopped_by_sigterm_exits_75_and_continues_to_the_same_bytes(
    train: Callable, undisturbed_run: Callable, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    stopped = train(folder, "term:7")
    assert stopped.code == 75, stopped.stderr
    assert "stopped and saved: run the same command to continue" in stopped.stdout.splitlines()
    assert saved_steps(folder) == [4, 7]  # saved where it stopped, between two logs
    assert len(metrics(folder)) == 2
    again = train(folder)
    assert "continues at:    112 images" in again.stdout.splitlines()
    assert_same_run(folder, undisturbed_run())


def test_two_processes_end_together_and_continue_to_the_same_bytes(
    train: Callable, undisturbed_run: Callable, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    killed = train(folder, "forward:7@1", processes=2)  # a hang would run into the timeout
    assert killed.code not in (0, 2, 75)
    assert saved_steps(folder) == [4]
    stopped = train(folder, "term:9@1", processes=2)
    assert stopped.code == 75, stopped.stderr
    assert "continues at:    64 images" in stopped.stdout.splitlines()
    assert stopped.stdout.count("stopped and saved: run the same command to continue") == 1
    assert saved_steps(folder) == [8, 12, 13]
    again = train(folder, processes=2)
    assert "DDP on 2 processes" in again.stdout
    assert "continues at:    208 images" in again.stdout.splitlines()
    assert_same_run(folder, undisturbed_run(2))
