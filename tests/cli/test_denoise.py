"""`launch/denoise.py` on a tiny trained run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from figures import same
from PIL import Image
from tiny import LAUNCH

from dgm.cli.denoise import check_run, curve_steps
from dgm.cli.load_run import TrainedRun
from dgm.common.errors import UserError
from dgm.diffusion.config import DiffusionConfig, DiffusionSampleConfig
from dgm.diffusion.objective import DiffusionObjective


@pytest.mark.slow
def test_sheets_metrics_and_curve_are_written(
    run_warm: Callable, tiny_run: Callable, tiny_shards: Path, tmp_path: Path
):
    options = ["--test_shards", tiny_shards, "--epochs", 1, "--num_images", 20, "--curve", 3]
    options += ["--steps", "9, 2", "--num_shown", 5, "--evaluations", 4]
    out, found = tmp_path / "new" / "folder", {}
    for processes in (1, 2):
        words = [LAUNCH / "denoise.py", tiny_run("diffusion"), *options, "--out", out]
        done = run_warm(*words, processes=processes)
        assert done.code == 0, done.stderr
        found[processes] = json.loads((out / "denoising.json").read_text())
    assert same(found[1], found[2], rel=1e-4)  # each computed a part
    rows = {row["steps"]: row for row in found[1]["steps"]}
    assert list(rows) == [9, 2] and found[1]["num_images"] == 20
    assert rows[2]["psnr_db_noised"] > rows[9]["psnr_db_noised"]  # less noise, more similar
    assert rows[2]["ssim_noised"] > rows[9]["ssim_noised"]
    assert [row["steps"] for row in found[1]["curve"]][-1] == found[1]["num_timesteps"]
    assert all(0 <= row["class_seen_denoised"] <= 1 for row in rows.values())
    sheet = np.asarray(Image.open(out / "steps-0009.png"))
    assert sheet.shape == (4 * 66 + 2, 5 * 66 + 2, 3)  # four rows of five images, twice as large
    assert (out / "curve.png").stat().st_size > 1000
    assert "class seen" in done.stdout and str(out) in done.stdout
    assert "warning" not in done.stderr


def test_curve_ends_at_all_steps():
    for total in (2, 50, 1000):
        for points in (1, 2, 10):
            steps = curve_steps(total, points)
            assert steps == sorted(set(steps)) and steps[-1] == total and steps[0] >= 1
    assert curve_steps(1000, 0) == []
    assert curve_steps(1000, 4) == [1, 10, 100, 1000]


def test_images_too_small_to_compare_are_refused():
    objective = DiffusionObjective(DiffusionConfig(), DiffusionSampleConfig(), (8, 8, 3), 10)
    with pytest.raises(UserError, match="runs/x was trained on images of side 8, too small"):
        check_run("runs/x", TrainedRun("diffusion", objective, {}, [], 0))
