"""Means between logs, and metrics.jsonl over kills and resumes."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from dgm.common.run_files import read_metrics
from dgm.training import metrics_log
from dgm.training.engine import Engine
from dgm.training.metrics_log import Meter, MetricsFile, ProgressBar


def line(images_seen: int, loss: float = 0.5) -> dict[str, float]:
    return {"step": images_seen // 10, "images_seen": images_seen, "train/loss": loss}


def seen(path: Path) -> list[float]:
    return [entry["images_seen"] for entry in read_metrics(path)]


def test_means_are_over_all_values_since_the_last_log(engine: Engine):
    meter = Meter()
    for value in (1.0, 2.0, 6.0):
        meter.add(["train/loss"], torch.tensor([value]))
    meter.add(["train/rare"], torch.tensor([5.0]))
    assert meter.means(engine) == {"train/loss": 3.0, "train/rare": 5.0}
    assert meter.means(engine) == {}
    meter.add(["train/loss"], torch.tensor([7.0]))
    assert meter.means(engine) == {"train/loss": 7.0}


def test_sums_are_held_in_double_precision_without_a_graph(engine: Engine):
    meter = Meter()
    for _ in range(10):
        meter.add(["a"], torch.tensor([0.1], dtype=torch.bfloat16, requires_grad=True))
        meter.add(["b"], torch.tensor([0.1], requires_grad=True))
    assert not meter.sums["a"].requires_grad and meter.sums["a"].dtype == torch.float64
    means = meter.means(engine)
    assert means["a"] == float(torch.tensor(0.1, dtype=torch.bfloat16))
    # Ten additions in float64 of what float32 holds of 0.1.
    assert means["b"] == pytest.approx(float(torch.tensor(0.1)), rel=1e-15)


def test_a_restored_meter_gives_the_same_means_to_the_last_bit(engine: Engine):
    values = torch.rand(10).tolist()
    whole, first, second = Meter(), Meter(), Meter()
    for value in values:
        whole.add(["a"], torch.tensor([value]))
    for value in values[:6]:
        first.add(["a"], torch.tensor([value]))
    first.add(["b"], torch.tensor([2.0]))
    second.restore(json.loads(json.dumps(first.state(engine))), engine)
    for value in values[6:]:
        second.add(["a"], torch.tensor([value]))
    assert second.means(engine) == {**whole.means(engine), "b": 2.0}


def test_a_meter_of_two_processes_or_none_is_restored_on_one(engine: Engine):
    meter = Meter()
    meter.restore(json.loads(json.dumps(Meter().state(engine))), engine)
    assert meter.means(engine) == {}
    meter.restore({"names": ["a"], "sums": [[2.0], [6.0]], "counts": [2]}, engine)
    assert meter.means(engine) == {"a": 2.0}  # (2 + 6) / (2 + 2)


def test_lines_are_read_as_they_were_written(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    file = MetricsFile(path, 0)
    assert read_metrics(path) == []
    for images in (10, 20):
        file.write(line(images, loss=0.1 + 0.2))
    assert read_metrics(path) == [line(10, 0.1 + 0.2), line(20, 0.1 + 0.2)]  # before it is closed
    file.sync()


def test_a_resumed_run_drops_lines_that_will_come_again(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path, 0)
    for images in (10, 20, 30, 40):
        first.write(line(images))
    second = MetricsFile(path, 20)
    assert seen(path) == [10, 20]
    second.write(line(30))
    assert seen(path) == [10, 20, 30]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "minima.json"]


@pytest.mark.parametrize("torn", ['{"step": 3, "ima', "{", "\n", '{"step": 3, "images_seen": 30'])
def test_a_torn_last_line_is_dropped(tmp_path: Path, torn: str):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line(images)) + "\n" for images in (10, 20)) + torn)
    assert seen(path) == [10, 20]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        MetricsFile(path, 1000).write(line(30))
    assert seen(path) == [10, 20, 30]


GOOD = [line(images) for images in (10, 20, 30, 40)]


@pytest.mark.parametrize(
    "damaged",
    [
        b'{"step": 3, "images_se',
        b'{"step": 3, "images_seen": 30, "train/loss": "0.5"}',
        b'{"step": NaN, "images_seen": NaN, "train/loss": 0.5}',
        b'{"step": 7, "images_seen": 30, "train/loss": 0.5}',  # a bit flipped in the step
        b'{"step": 3, "images_seen": 1e999, "train/loss": 0.5}',
        b'{"step": 3, "images_seen": ' + b"9" * 400 + b"}",
        b'{"step": 0, "images_seen": 0}',
        b'{"step": true, "images_seen": 10}',
        b'{"step": 3, "images_seen": 30, "train/l\xffss": 0.5}',
        b"[3, 30]", b"null", b"\x00\x00\x00", b"[" * 100_000, b"30",
    ],
)  # fmt: skip
def test_a_damaged_line_is_named_and_dropped(tmp_path: Path, damaged: bytes):
    path = tmp_path / "metrics.jsonl"
    texts = [json.dumps(entry).encode() for entry in GOOD]
    path.write_bytes(b"\n".join([*texts[:2], damaged, texts[3], b""]))
    with pytest.warns(UserWarning, match=r"jsonl is damaged in 1 .* dropped: 3$") as caught:
        MetricsFile(path, 1000).write(line(50))
    assert [warned.category for warned in caught].count(UserWarning) == 1
    assert read_metrics(path) == [GOOD[0], GOOD[1], GOOD[3], line(50)]


def test_any_flipped_byte_leaves_each_step_once_and_the_rest_as_it_was(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    whole = b"".join(json.dumps(entry).encode() + b"\n" for entry in GOOD)
    rng = np.random.default_rng(0)
    for place in range(0, len(whole), 3):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << rng.integers(8)
        path.write_bytes(flipped)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            MetricsFile(path, 1000).write(line(50))
        left = read_metrics(path)
        steps = [entry["step"] for entry in left]
        assert steps == sorted(set(steps)) and steps[-1] == 5, place
        assert sum(entry in left for entry in GOOD) >= 2, place  # a lost newline costs two


def test_a_repeated_step_is_read_once(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line(images)) + "\n" for images in (10, 20, 20, 10, 30)))
    MetricsFile(path, 1000)
    assert seen(path) == [10, 20, 30]


def test_a_damaged_file_of_minima_is_written_anew(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    MetricsFile(path, 0).write(line(10, 0.25))
    before = (tmp_path / "minima.json").read_text()
    (tmp_path / "minima.json").write_text("{torn")
    MetricsFile(path, 10)
    assert (tmp_path / "minima.json").read_text() == before


def test_a_last_line_without_its_newline_is_whole(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(line(10)) + "\n" + json.dumps(line(20)))
    MetricsFile(path, 20).write(line(30))
    assert seen(path) == [10, 20, 30]


def test_a_loss_that_is_not_a_number_can_be_read_back(tmp_path: Path):
    MetricsFile(tmp_path / "metrics.jsonl", 0).write(line(10, float("nan")))
    assert np.isnan(read_metrics(tmp_path / "metrics.jsonl")[0]["train/loss"])


def test_what_takes_a_while_is_named_and_is_no_slow_training(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    now = [100.0]
    monkeypatch.setattr(metrics_log.time, "monotonic", lambda: now[0])
    progress = ProgressBar(1000, 0, shown=True)
    progress.advance(50)
    for what, seconds in (("saving", 1), ("drawing samples", 40)):
        with progress.during(what):
            now[0] += seconds
    assert capsys.readouterr().err == "drawing samples: 40 s\n"
    now[0] += 10
    progress.advance(150)
    assert "10 images/s" in capsys.readouterr().err


def test_progress_says_images_loss_and_time_left(capsys: pytest.CaptureFixture[str]):
    progress = ProgressBar(1000, 0, shown=True, every_s=0.0)
    progress.set_losses({"loss": 0.25})
    progress.advance(50)  # the first step compiles: its speed is no one's
    assert capsys.readouterr().err == ""
    progress.advance(100)
    progress.close()
    output = capsys.readouterr().err
    assert "100/1,000 images" in output and "loss 0.2500" in output and "images/s" in output
    ProgressBar(1000, 0, shown=False, every_s=0.0).advance(100)
    assert capsys.readouterr().err == ""
