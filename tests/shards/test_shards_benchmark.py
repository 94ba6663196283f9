"""`python launch/benchmark.py data`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "launch" / "benchmark.py"


@pytest.mark.slow
def test_data_benchmark_reports_rates_and_start(run_script, tmp_path: Path) -> None:
    options = ["--num-images", "600", "--batch", "16", "--repetitions", "1", "--json"]
    done = run_script(SCRIPT, "data", *options, tmp_path / "out.json")
    assert "shards.reader" in done.stdout and "first batch" in done.stdout, done.stderr
    result = json.loads((tmp_path / "out.json").read_text())["data"]
    assert all(len(rates) == 1 for rates in result["images_per_s"].values())
    assert len(result["images_per_s"]) == 3 and result["ratio"] > 0
    assert min(result["first_batch_s"]["shards.reader, tars cached"]) > 0
