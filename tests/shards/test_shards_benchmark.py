"""`python launch/benchmark.py data`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "launch" / "benchmark.py")


@pytest.mark.slow
def test_data_benchmark_reports_rates_and_start(tmp_path: Path) -> None:
    options = ["--num-images", "600", "--batch", "16", "--repetitions", "1", "--json"]
    command = [sys.executable, SCRIPT, "data", *options, str(tmp_path / "out.json")]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "shards.reader" in output and "first batch" in output
    result = json.loads((tmp_path / "out.json").read_text())["data"]
    assert all(len(rates) == 1 for rates in result["images_per_s"].values())
    assert len(result["images_per_s"]) == 3 and result["ratio"] > 0
    assert min(result["first_batch_s"]["shards.reader, tars cached"]) > 0
