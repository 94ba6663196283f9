"""Means between logs, and metrics.jsonl of resumed runs.

Arbitrary damage to the file is drawn in tests/test_damaged_runs.py.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

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


def test_sums_are_in_double_precision_without_a_graph(engine: Engine):
    meter = Meter()
    for _ in range(10):
        meter.add(["a"], torch.tensor([0.1], dtype=torch.bfloat16, requires_grad=True))
        meter.add(["b"], torch.tensor([0.1], requires_grad=True))
    assert not meter.sums["a"].requires_grad and meter.sums["a"].dtype == torch.float64
    means = meter.means(engine)
    assert means["a"] == float(torch.tensor(0.1, dtype=torch.bfloat16))
    # Ten additions in float64 of 0.1 rounded to float32.
    assert means["b"] == pytest.approx(float(torch.tensor(0.1)), rel=1e-15)


def test_a_restored_meter_has_the_same_means_to_the_last_bit(engine: Engine):
    values = torch.rand(10).tolist()
    whole, first, second = Meter(), Meter(), Meter()
    second.restore(json.loads(json.dumps(Meter().state(engine))), engine)  # an empty one
    assert second.means(engine) == {}
    for value in values:
        whole.add(["a"], torch.tensor([value]))
    for value in values[:6]:
        first.add(["a"], torch.tensor([value]))
    first.add(["b"], torch.tensor([2.0]))
    second.restore(json.loads(json.dumps(first.state(engine))), engine)
    for value in values[6:]:
        second.add(["a"], torch.tensor([value]))
    assert second.means(engine) == {**whole.means(engine), "b": 2.0}
    # The state of two processes, restored on one.
    second.restore({"names": ["a"], "sums": [[2.0], [6.0]], "counts": [2]}, engine)
    assert second.means(engine) == {"a": 2.0}  # (2 + 6) / (2 + 2)


def test_a_resumed_run_drops_lines_that_will_be_written_again(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    first = MetricsFile(path, 0)
    assert read_metrics(path) == []
    lines = [line(10, 0.1 + 0.2), line(20), line(30), line(40)]
    for each in lines:
        first.write(each)
    assert read_metrics(path) == lines  # although the file is open
    second = MetricsFile(path, 20)
    assert read_metrics(path) == lines[:2]
    second.write(line(30, float("nan")))
    assert seen(path) == [10, 20, 30]
    assert np.isnan(read_metrics(path)[-1]["train/loss"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "minima.json"]


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
def test_a_damaged_line_is_reported_and_dropped(tmp_path: Path, damaged: bytes):
    path = tmp_path / "metrics.jsonl"
    texts = [json.dumps(entry).encode() for entry in GOOD]
    path.write_bytes(b"\n".join([*texts[:2], damaged, texts[3], b""]))
    with pytest.warns(UserWarning, match=r"jsonl is damaged in 1 .* dropped: 3$") as caught:
        MetricsFile(path, 1000).write(line(50))
    assert [warned.category for warned in caught].count(UserWarning) == 1
    assert read_metrics(path) == [GOOD[0], GOOD[1], GOOD[3], line(50)]


@pytest.mark.parametrize(
    ("content", "kept"),
    [
        ([10, 20, 20, 10, 30], [10, 20, 30]),  # repeated steps
        ([10, 20, '{"step": 3, "ima'], [10, 20]),  # torn by a power cut
        ([10, 20, '{"step": 3, "images_seen": 30'], [10, 20]),
        ([10, 20, ""], [10, 20]),
    ],
)
def test_the_log_holds_each_step_once(tmp_path: Path, content: list[Any], kept: list[int]):
    path = tmp_path / "metrics.jsonl"
    texts = [json.dumps(line(each)) if isinstance(each, int) else each for each in content]
    path.write_text("\n".join(texts))  # without a newline at the end
    assert seen(path) == kept
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        MetricsFile(path, 1000).write(line(50))
    assert seen(path) == [*kept, 50]


def test_a_damaged_file_of_minima_is_replaced(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    MetricsFile(path, 0).write(line(10, 0.25))
    before = (tmp_path / "minima.json").read_text()
    (tmp_path / "minima.json").write_text("{torn")
    MetricsFile(path, 10)
    assert (tmp_path / "minima.json").read_text() == before


def test_progress_without_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    now = [100.0]
    monkeypatch.setattr(metrics_log.time, "monotonic", lambda: now[0])
    progress = ProgressBar(1000, 0, shown=True)
    progress.set_losses({"loss": 0.25})
    now[0] += 99
    progress.advance(50)  # the first step compiles: its speed does not count
    for what, seconds in (("saving", 1), ("drawing samples", 40)):
        with progress.during(what):
            now[0] += seconds
    assert capsys.readouterr().err == "drawing samples: 40 s\n"
    now[0] += 10
    progress.advance(150)
    output = capsys.readouterr().err
    assert output == "150/1,000 images  loss 0.2500  10 images/s  1:25 left\n"
    now[0] += 9
    progress.advance(250)
    ProgressBar(1000, 0, shown=False).advance(100)
    assert capsys.readouterr().err == ""
