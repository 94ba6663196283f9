"""Damaged files of a run are skipped with a warning, or named in an error."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import attempt, changed, damaged, examples
from hypothesis import given
from hypothesis import strategies as st
from written_runs import ENVIRONMENT, opened, write_run

from dgm.common.run_files import read_config, scan_metrics
from dgm.report.page import make_page
from dgm.report.read_run import read_log
from dgm.training import checkpoint
from dgm.training.metrics_log import MetricsFile
from slurm import status
from slurm.run_state import RunState


def with_warnings(read: Callable) -> tuple[Any, list[str]]:
    """Return the result and the warnings."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        found = read()
    return found, [str(one.message) for one in warned]


# Checkpoints


def state(seen: int) -> checkpoint.Checkpoint:
    generator = torch.Generator().manual_seed(seen)
    tensors = {"net.weight": torch.randn(3, 4, generator=generator)}
    return checkpoint.Checkpoint(
        tensors,
        {"net.exp_avg.weight": tensors["net.weight"] ** 2},
        tensors,
        {"images_seen": seen, "step": seen // 16, "best": None},
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write two checkpoints."""
    folder = tmp_path_factory.mktemp("saved")
    for seen in (16, 32):
        checkpoint.write(folder, seen, state(seen), keep=2)
    return folder


@pytest.mark.parametrize("name", [*checkpoint.FILES, checkpoint.MANIFEST])
@examples(40)
@given(data=st.data())
def test_a_damaged_checkpoint_is_skipped_by_name(saved: Path, name: str, data) -> None:
    path = saved / "000000032" / name
    whole = path.read_bytes()
    content = data.draw(damaged(whole))
    if name.endswith("json") and data.draw(st.booleans()):
        content = json.dumps(data.draw(changed(json.loads(whole)))).encode()
    try:
        path.write_bytes(content)
        found, warned = with_warnings(lambda: checkpoint.newest(saved))
        assert found is not None
        if found.name == "000000016":
            [line] = warned
            assert str(path.parent) in line and "\n" not in line
        else:
            read = checkpoint.read(found)
            assert read.state == state(32).state and not warned
            assert torch.equal(read.ema["net.weight"], state(32).ema["net.weight"])
    finally:
        path.write_bytes(whole)


# Logs

LINES = [
    {"step": k, "images_seen": 16 * k, "wall_s": 0.5 * k, "train/loss": 1 / k, "time/save_s": 0.1}
    for k in range(1, 6)
]
LOG = "".join(json.dumps(line) + "\n" for line in LINES).encode()


def write_on(path: Path, line: dict[str, float]) -> None:
    log = MetricsFile(path, 48)
    log.write(line)
    log.file.close()


@examples(200)
@given(content=damaged(LOG))
def test_lines_lost_of_a_damaged_log_are_reported(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content)
    found, left_out = scan_metrics(path)
    seen = [line["images_seen"] for line in found]
    assert seen == sorted(set(seen))
    texts = [text for text in content.split(b"\n") if text.strip()]
    intact = {line["images_seen"] for line in LINES if json.dumps(line).encode() in texts}
    assert intact <= set(seen)
    assert len(found) + len(left_out) <= len(texts)
    if not left_out:
        assert {json.loads(text)["images_seen"] for text in texts} == set(seen)
    # A resumed run repairs the log and warns of the lost lines.
    _, warned = with_warnings(lambda: write_on(path, {**LINES[3], "train/loss": 0.5}))
    assert len(warned) == bool(left_out) and all(str(path) in one for one in warned)
    again, left_out = scan_metrics(path)
    assert not left_out and again[-1]["images_seen"] == 64
    assert all(line["images_seen"] <= 48 for line in again[:-1])


@examples(200)
@given(content=damaged(LOG))
def test_the_report_reads_a_damaged_log_or_names_it(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content)
    attempt(lambda: read_log(path), path)


@examples(60)
@given(data=st.data())
def test_a_damaged_configuration_of_a_run(tmp_path: Path, data) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(data.draw(damaged(b"run: {dir: a, seed: 0}\ntrain:\n  total_images: 100\n")))
    attempt(lambda: read_config(path), path)


# Other files of a report

EVALUATION = {
    "images_seen": 300, "checkpoint": "0123abcd",
    "class_consistency": {
        "class_consistency": 0.975, "class_consistency_by_class": {"circle": 0.5},
        "spread_over_seeds": {"class_consistency": 0.0125}, "num_seeds": 2,
        "by_seed": [{"class_consistency": 0.9625}],
    },
    "distances_classifier": {"fd_classifier": 12.5, "num_generated": 500, "first_seed": 1},
    "bits_per_dim": {"bound": 3.25, "error": 0.0125},
}  # fmt: skip
STARTS = [{"time": "now", "images_seen": 0, "changed": {"train.total_images": [1, 2]},
           **ENVIRONMENT}]  # fmt: skip
HISTORY = [
    {"event": "start", "submission": "now", "restart": 0, "processes": 2, "nodes": ["a"]},
    {"event": "end", "submission": "now", "verdict": "fault", "progress": False, "code": 1},
]
JOB = {"cluster": "local", "job": "local-1", "pid": 2**22 + 1, "submission": "now",
       "total_images": 300}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a run with every file that reports and status read."""
    folder = write_run(tmp_path_factory.mktemp("runs") / "x", [3.0, 2.0, 1.0])
    (folder / "slurm").mkdir()
    for name, content in DOCUMENTS.items():
        write(folder / name, content)
    return folder


def write(path: Path, content: Any) -> None:
    lines = content if path.suffix == ".jsonl" else [content]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


DOCUMENTS: dict[str, Any] = {
    "evaluation.json": EVALUATION,
    "environment.json": ENVIRONMENT,
    "starts.jsonl": STARTS,
    "metrics.jsonl": [{**line, "time/images_per_s": 5.0, "eval/bits_per_dim": 3.0}
                      for line in LINES],
    "slurm/history.jsonl": HISTORY,
    "slurm/job.json": JOB,
}  # fmt: skip


@pytest.mark.parametrize("name", DOCUMENTS)
@examples(60)
@given(data=st.data())
def test_a_damaged_file_is_named_or_shown(run: Path, name: str, data) -> None:
    path = run / name
    whole = copy.deepcopy(DOCUMENTS[name])
    try:
        for _ in range(data.draw(st.integers(1, 3))):
            whole = data.draw(changed(whole)) if whole else whole
        write(path, whole)
        if data.draw(st.integers(0, 3)) == 0:
            path.write_bytes(data.draw(damaged(path.read_bytes())))
        found = attempt(lambda: opened(run), path)
        if found is not None:
            several = data.draw(st.booleans())
            make_page("x", [found, opened(run, "other")] if several else [found], [])
        [row] = status.rows([RunState(run)])
        assert status.table([row], run.parent).row_count == 1
        assert RunState(run).failures_in_a_row("now") >= 0
    finally:
        write(path, DOCUMENTS[name])
