"""`launch/explore.py` on the smallest run of each family."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from figures import same
from PIL import Image
from tiny import LAUNCH

from dgm.cli.explore import choose_settings, make_parser, sheets_of
from dgm.cli.load_run import TrainedRun
from dgm.cli.parser import TRAINERS
from dgm.diffusion.objective import DiffusionConfig, DiffusionObjective, DiffusionSampleConfig

FEW = ["--epochs", 1, "--num_images", 20, "--num_pairs", 2, "--num_shown", 5]


def shape(path: Path) -> tuple[int, int]:
    """Return rows and columns of a sheet of 32 x 32 images, enlarged twice."""
    height, width, _ = np.asarray(Image.open(path)).shape
    assert (height - 2) % 66 == 0 and (width - 2) % 66 == 0
    return (height - 2) // 66, (width - 2) // 66


def untimed(found: dict[str, Any]) -> dict[str, Any]:
    """Return results without times and the number of processes."""
    rows = [
        {name: value for name, value in row.items() if name != "seconds_per_image"}
        for row in found["settings"]["rows"]
    ]
    assert all(row["seconds_per_image"] > 0 for row in found["settings"]["rows"])
    return {**found, "settings": {**found["settings"], "rows": rows}, "num_processes": 0}


@pytest.mark.slow
@pytest.mark.parametrize("family", TRAINERS)
def test_every_family_is_explored(
    family: str, run_warm: Callable, tiny_run: Callable, tiny_shards: Path, tmp_path: Path
):
    words = [LAUNCH / "explore.py", tiny_run(family), "--test_shards", tiny_shards, *FEW]
    guided = ["--guidance", "1,3", "--steps", "2,4"]
    words += guided if family == "diffusion" else ["--temperature", "0.5,1"]
    out = tmp_path / "new" / "out"
    done = run_warm(*words, "--out", out)
    assert done.code == 0 and "warning" not in done.stderr, done.stderr
    found = json.loads((out / "exploration.json").read_text())
    assert found["family"] == family and found["images_seen"] == 256 and not found["notes"]
    sheets = {sheet["file"]: shape(out / sheet["file"]) for sheet in found["sheets"]}
    assert sheets["interpolation.png"] == (2, 11 if family == "gan" else 13)
    assert all(row["largest_over_mean"] >= 1 for row in found["interpolation"]["rows"])
    assert found["interpolation"]["along"] == ("line" if family == "flow" else "sphere")
    if family in ("gan", "diffusion"):  # both are class-conditional
        assert all(row["from"] == row["to"] for row in found["interpolation"]["rows"])
    if family in ("flow", "diffusion"):  # whose latents hold all of an image
        assert found["interpolation"]["psnr_db_of_ends"] > 25
    rows = found["settings"]["rows"]
    if family == "diffusion":
        assert "traversal" not in found
        assert sheets["guidance-1.png"] == sheets["guidance-3.png"] == (2, 5)
        tried = [(row["guidance"], row["steps"]) for row in rows]
        assert tried == [(1, 2), (1, 4), (3, 2), (3, 4)]
    else:
        (name,) = found["settings"]["varied"]
        assert sheets["traversal.png"] == (8, 11) and sheets[f"{name}.png"] == (2, 5)
        kind = "kl_nats" if family == "vae" else "change_per_unit"
        assert found["traversal"]["reach"] == pytest.approx(2.1 if family == "flow" else 3)
        moved = [row[kind] for row in found["traversal"]["rows"]]
        assert moved == sorted(moved, reverse=True) and moved[0] > 0
        assert rows[0]["diversity"] < rows[1]["diversity"]  # the wider, the more diverse
    quality = "class_consistency" if family in ("gan", "diffusion") else "class_certainty"
    assert all(0 <= row[quality] <= 1 and row["fd_classifier"] > 0 for row in rows)
    assert found["settings"]["real"]["fd_classifier"] < min(row["fd_classifier"] for row in rows)
    assert (out / "quality.png").stat().st_size > 1000 and str(out) in done.stdout
    if family == "gan":
        two = run_warm(*words, "--out", tmp_path / "two", processes=2)
        assert two.code == 0, two.stderr
        again = json.loads((tmp_path / "two" / "exploration.json").read_text())
        assert again["num_processes"] == 2 and same(untimed(found), untimed(again))


def chosen(words: list[str], **config: Any) -> tuple[list[dict[str, Any]], list[str]]:
    objective = DiffusionObjective(
        DiffusionConfig(**config), DiffusionSampleConfig(steps=1), (8, 8, 3), 10
    )
    options = make_parser().parse_args(["runs/x", *words])
    return choose_settings(options, TrainedRun("diffusion", objective, {}, [], 0))


def test_guidance_is_left_out_where_a_run_cannot_be_guided():
    settings, notes = chosen(["--guidance", "1,2"], class_conditional=False)
    assert settings == [{"steps": steps} for steps in (5, 10, 20)]
    assert notes == ["Guidance is left out: the run was trained without classes."]
    _, notes = chosen([], label_drop=0.0)
    assert notes == ["Guidance is left out: the run was trained without diffusion.label_drop."]


def test_steps_by_default_are_those_that_the_schedule_has():
    settings, notes = chosen(["--guidance", "2"], num_timesteps=12)
    assert settings == [{"guidance": 2, "steps": 5}, {"guidance": 2, "steps": 10}] and not notes
    assert [s["steps"] for s in chosen(["--guidance", "1"], num_timesteps=3)[0]] == [3]


def test_settings_share_sheets_by_all_but_their_last_name():
    settings = [{"guidance": g, "steps": s} for g in (1.0, 2.5) for s in (5, 10)]
    assert sheets_of(settings) == [
        ("guidance-1", "Guidance 1: the same draws, rows by steps: 5, 10.", [0, 1]),
        ("guidance-2.5", "Guidance 2.5: the same draws, rows by steps: 5, 10.", [2, 3]),
    ]
    assert sheets_of([{"temperature": 0.5}, {"temperature": 1.0}]) == [
        ("temperature", "The same draws, rows by temperature: 0.5, 1.", [0, 1])
    ]
