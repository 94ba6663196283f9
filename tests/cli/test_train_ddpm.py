"""`launch/train_ddpm.py` as a user runs it: its output, its files, its flags."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import yaml
from errors import error_of
from PIL import Image
from tiny import BATCH, LAUNCH
from trees import tree_of

from dgm.common.json_files import read_objects
from dgm.training.checkpoint import find_fault

SCRIPT = LAUNCH / "train_ddpm.py"
STEPS = 16  # of the tiny configuration

pytestmark = pytest.mark.slow


@pytest.fixture
def train(run_warm: Callable, tiny_config: Path, tmp_path: Path) -> Callable:
    """Return a function that trains the tiny configuration in `tmp_path / "run"`."""

    def run(*options: object, driver: Sequence[object] = (), processes: int = 1):
        words = [*driver, SCRIPT, "--config", tiny_config, "--run.dir", tmp_path / "run"]
        return run_warm(*words, *options, processes=processes)

    return run


def read_metrics(folder: Path) -> list[dict[str, float]]:
    return read_objects(folder / "metrics.jsonl")


def test_plain_python_trains_and_writes_the_files_of_a_run(
    run_script: Callable, tiny_config: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    done = run_script(SCRIPT, "--config", tiny_config, "--run.dir", folder)
    assert done.code == 0, done.stderr
    printed = dict(line.split(":", 1) for line in done.stdout.splitlines())
    names = ("data", "parameters", "GFLOP per image", "engine", "device", "precision")
    assert list(printed)[: len(names)] == list(names)
    printed = {name: " ".join(text.split()) for name, text in printed.items()}
    assert printed["parameters"] == "net 0.03 M"
    assert printed["engine"] == "one process" and printed["device"].startswith("cpu")
    assert printed["precision"] == "float32"
    expected = float(printed["expected memory"].split()[1])
    assert 0.7 < expected / read_metrics(folder)[-1]["memory/peak_gib"] < 1.3
    assert printed["length"] == "256 images; log every 16, checkpoint every 64"
    assert printed["finished"] == "256 images seen"
    assert Path(printed["sample grid"]) == folder / "samples" / f"{STEPS * BATCH:09d}.png"
    assert Path(printed["loss curve"]).is_file()
    assert done.stderr == ""

    assert {path.name for path in folder.iterdir()} == {
        "checkpoints", "config.yaml", "environment.json", "loss.png", "metrics.jsonl",
        "minima.json", "samples", "starts.jsonl", "tensorboard",
    }  # fmt: skip
    saves = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert saves == ["000000128", "000000192", "000000256"]  # the last keep_checkpoints
    assert all(find_fault(folder / "checkpoints" / name) is None for name in saves)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["data"]["shards"] == str(tiny_shards)
    assert config["train"]["global_batch"] == BATCH
    assert config["diffusion"]["num_timesteps"] == 1000  # defaults are written out
    environment = json.loads((folder / "environment.json").read_text())
    names = {"git_commit", "git_dirty", "versions", "devices", "world_size", "engine"}
    assert names <= set(environment)
    assert environment["world_size"] == 1 and environment["versions"]["torch"]
    lines = read_metrics(folder)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["images_seen"] for line in lines] == [BATCH * n for n in range(1, STEPS + 1)]
    assert set(lines[0]) == {
        "step", "images_seen", "wall_s", "train/loss", "train/grad_norm", "train/lr",
        "time/images_per_s", "time/data_wait_s", "memory/peak_gib",
    }  # fmt: skip
    assert [line["wall_s"] for line in lines] == sorted(line["wall_s"] for line in lines)
    with Image.open(folder / "samples" / f"{STEPS * BATCH:09d}.png") as grid:
        assert grid.mode == "RGB" and grid.height > 10 * 32 > grid.width > 32


def test_same_command_on_a_finished_run_ends_at_once_and_a_longer_one_continues(
    train: Callable, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    assert train().code == 0
    files, lines = tree_of(folder / "checkpoints"), read_metrics(folder)
    again = train()
    assert again.code == 0, again.stderr
    message = "already seen:    256 of 256 images: the run is finished; to train longer, raise"
    assert message in again.stdout
    assert "finished: 256 images seen" in again.stdout.splitlines()
    assert tree_of(folder / "checkpoints") == files
    assert read_metrics(folder) == lines
    longer = train("--train.total_images=320", "--train.micro_batch=8")
    assert longer.code == 0, longer.stderr
    assert "changed:         train.total_images from 256 to 320" in longer.stdout.splitlines()
    assert [line["step"] for line in read_metrics(folder)] == list(range(1, 21))
    starts = read_objects(folder / "starts.jsonl")
    assert [start["images_seen"] for start in starts] == [0, 256, 256]
    changed = {"train.total_images": [256, 320], "train.micro_batch": [None, 8]}
    assert [start["changed"] for start in starts[1:]] == [{}, changed]
    assert yaml.safe_load((folder / "config.yaml").read_text())["train"]["total_images"] == 320


def test_run_folder_that_was_moved_continues(train: Callable, tmp_path: Path) -> None:
    assert train("--train.total_images=64").code == 0
    (tmp_path / "run").rename(tmp_path / "moved")
    moved = train("--train.total_images=128", "--run.dir", tmp_path / "moved")
    assert moved.code == 0, moved.stderr
    assert "continues at:    64 images" in moved.stdout
    assert not (tmp_path / "run").exists()


def test_tensorboard_shows_every_step_once_after_a_kill(train: Callable, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    driver = [LAUNCH.parent / "tests" / "drills" / "signal_at.py", "forward:7"]
    assert train(driver=driver).code == -signal.SIGKILL
    assert train().code == 0
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert events.Tags()["images"] == ["samples"]
    lines = read_metrics(tmp_path / "run")
    for name in (key for key in lines[0] if "/" in key):
        scalars = events.Scalars(name)
        assert [scalar.step for scalar in scalars] == list(range(1, STEPS + 1)), name
        expected = np.float32([line[name] for line in lines])
        assert np.array_equal(np.float32([scalar.value for scalar in scalars]), expected), name


def test_printed_config_is_a_config(train: Callable, run_warm: Callable, tmp_path: Path) -> None:
    options = ("--optim.betas=[0.8,0.99]", "--train.total_images=16", "--train.micro_batch=4")
    printed = train(*options, "--print_config")
    assert printed.code == 0, printed.stderr
    assert not (tmp_path / "run").exists()
    config = tmp_path / "printed.yaml"
    config.write_text(printed.stdout)
    assert run_warm(SCRIPT, "--config", config).code == 0
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert written == yaml.safe_load(printed.stdout)
    assert written["optim"]["betas"] == [0.8, 0.99]
    # A run's own config.yaml is a config, too: it continues the same run without a changed key.
    again = run_warm(SCRIPT, "--config", tmp_path / "run" / "config.yaml")
    assert again.code == 0, again.stderr
    assert read_objects(tmp_path / "run" / "starts.jsonl")[-1]["changed"] == {}


def test_overfitting_one_batch_makes_the_loss_fall(train: Callable, tmp_path: Path) -> None:
    done = train(
        "--train.overfit_one_batch", "--train.total_images=1600", "--train.log_every_images=160",
        "--model.dropout=0", "--optim.lr=1e-2", "--train.save_every_images=0",
    )  # fmt: skip
    assert done.code == 0, done.stderr
    found = [line["train/loss"] for line in read_metrics(tmp_path / "run")]
    assert found[-1] < 0.7 * found[0]
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["train"]["overfit_one_batch"] is True


def test_profile_and_anomaly_detection_run(train: Callable, tmp_path: Path) -> None:
    done = train("--train.profile_steps=2", "--train.detect_anomaly", "--train.total_images=128")
    assert done.code == 0, done.stderr
    traces = list((tmp_path / "run" / "profile").iterdir())
    assert len(traces) == 1
    events = json.loads(traces[0].read_text())["traceEvents"]
    steps = {e["name"] for e in events if e.get("name", "").startswith("ProfilerStep")}
    assert steps == {"ProfilerStep#2", "ProfilerStep#3"}
    assert any(e.get("name") == "aten::convolution_backward" for e in events)


@pytest.mark.parametrize("processes", [1, 2])
def test_gradient_that_is_not_finite_stops_the_run_and_keeps_its_checkpoint(
    train: Callable, tmp_path: Path, processes: int
) -> None:
    wild = ("--optim.lr=1e30", "--optim.clip_norm=0", "--optim.warmup_images=0")
    options = (*wild, "--train.save_every_images=16")
    error = error_of(train(*options, processes=processes))
    assert error.startswith("error: the gradient of denoise is not finite at step 1 (after 16")
    assert "optim.lr" in error and "optim.clip_norm" in error
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert saved.name == "000000016" and find_fault(saved) is None
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1]
    files = tree_of(saved)
    assert train(*options, processes=processes).code == 2
    assert tree_of(saved) == files
