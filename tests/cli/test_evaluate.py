"""`launch/evaluate.py` on tiny trained runs."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from errors import error_of
from PIL import Image
from random_inception import write_random_weights
from safetensors.torch import load_file
from tiny import LAUNCH

from dgm.cli import load_run
from dgm.cli.load_run import load_run_on_all
from dgm.training import checkpoint
from dgm.training.engine import Engine
from shards import shapes
from shards.build import build

EVALUATE = LAUNCH / "evaluate.py"

pytestmark = pytest.mark.slow


@pytest.fixture
def runs(tiny_run: Callable[[str], Path], tmp_path: Path) -> dict[str, Path]:
    """Return copies of the smallest runs of two families."""
    folders = {family: tmp_path / family for family in ("diffusion", "vae")}
    for family, folder in folders.items():
        shutil.copytree(tiny_run(family), folder)
    return folders


@pytest.fixture
def options(tiny_shards: Path) -> list[object]:
    return ["--test_shards", tiny_shards, "--epochs", 1, "--num_images", 20, "--num_test", 8]


def found_in(run: Path) -> dict:
    return json.loads((run / "evaluation.json").read_text())


def test_runs_are_shown_side_by_side_and_new_metrics_are_added(
    run_warm: Callable, runs: dict[str, Path], options: list[object]
) -> None:
    both = [runs["diffusion"], runs["vae"]]
    done = run_warm(EVALUATE, *both, *options, "--seeds", 2)
    assert done.code == 0, done.stderr
    assert re.search(r"^ +diffusion +vae$", done.stdout, re.MULTILINE)
    assert re.search(r"FD-classifier( +[\d.e,]+ ± \S+){2} ", done.stdout)
    found = [found_in(run) for run in both]
    assert "bits_per_dim" in found[1] and "loss_by_timestep" in found[0]
    error = found[1]["reconstruction"]
    assert 0 < error["rms_error_grey_levels"] < 255 and 0 < error["ssim"] < 1
    assert error["psnr_db"] == pytest.approx(20 * math.log10(255 / error["rms_error_grey_levels"]))
    for one in found:
        far = one["distances_classifier"]
        assert far["num_generated"] == 20 and far["num_seeds"] == 2 and far["against"] == "train"
        seeds = [own["fd_classifier"] for own in far["by_seed"]]
        assert far["fd_classifier"] == pytest.approx(sum(seeds) / 2) and seeds[0] != seeds[1]
        assert "FID" not in json.dumps(one) and "fid" not in far
    # Earlier metrics of the same checkpoint stay.
    words = ["--metrics", "bits_per_dim_ode,cost", "--ode_steps", 8]
    more = run_warm(EVALUATE, both[0], *options, *words)
    assert more.code == 0, more.stderr
    grown = found_in(both[0])
    weights = load_file(next(both[0].glob("checkpoints/*/model.safetensors")))
    cost = grown.pop("cost")
    assert cost["num_parameters"] == sum(w.numel() for w in weights.values())
    assert cost["num_timed"] == 20 and cost["seconds_per_image"] > 0
    by_ode = grown.pop("bits_per_dim_ode")
    assert by_ode["error"] > 0 and by_ode["steps"] == 8 and by_ode["discretization_error"] >= 0
    assert grown == found[0]
    # Those of another checkpoint do not.
    path = both[0] / "evaluation.json"
    path.write_text(json.dumps({**grown, "checkpoint": "another"}))
    run_warm(EVALUATE, both[0], *options, "--metrics", "class_consistency")
    assert set(found_in(both[0])) == {"images_seen", "checkpoint", "class_consistency"}
    path.write_text("{")
    damaged = run_warm(EVALUATE, both[0], *options, "--metrics", "class_consistency")
    assert damaged.code == 0 and "evaluation.json is damaged and is replaced" in damaged.stderr


def test_two_processes_compute_the_same(
    run_warm: Callable, runs: dict[str, Path], options: list[object]
) -> None:
    found = []
    for processes in (1, 2):
        done = run_warm(EVALUATE, runs["diffusion"], *options, processes=processes)
        assert done.code == 0, done.stderr
        found.append(found_in(runs["diffusion"]))
        (runs["diffusion"] / "evaluation.json").unlink()
    assert set(found[0]) == set(found[1])
    for name, metrics in found[0].items():
        other = found[1][name]
        assert type(metrics) is type(other)
        for key, value in metrics.items() if isinstance(metrics, dict) else ():
            # Batches of other sizes round differently, by a grey level in some pixels.
            same = pytest.approx(value, rel=1e-3) if isinstance(value, float) else value
            if not isinstance(value, dict):
                assert other[key] == same, (name, key)


def test_inception_needs_its_file_and_other_weights_are_named_by_their_hash(
    run_warm: Callable, runs: dict[str, Path], options: list[object], tmp_path: Path
) -> None:
    words = [EVALUATE, runs["vae"], *options, "--metrics", "precision_recall"]
    words += ["--features", "inception"]
    assert "weights-inception-2015-12-05-6726825d.pth" in error_of(run_warm(*words))
    weights = write_random_weights(tmp_path / "other.pth")
    few = ["--against", "test", "--num_images", 6, "--test_shards", _few(tmp_path)]
    done = run_warm(*words, *few, "--weights", weights)
    assert done.code == 0, done.stderr
    assert "standard" in done.stderr and "other.pth" in done.stderr
    (name,) = (key for key in found_in(runs["vae"]) if key.startswith("precision_recall_inc"))
    assert re.fullmatch(r"precision_recall_inception-[0-9a-f]{8}", name)
    assert found_in(runs["vae"])[name]["num_real"] == 6 < 10


def _few(folder: Path) -> Path:
    """Build shards of ten test images."""
    for label, name in enumerate(shapes.CLASSES):
        pictures = folder / "pictures" / "test" / name
        pictures.mkdir(parents=True)
        Image.fromarray(shapes.render("test", label)).save(pictures / "0.png")
    build(f"folder:{folder / 'pictures'}", "test", folder / "few", progress=False)
    return folder / "few"


def test_other_images_than_those_of_the_checkpoint_are_refused(
    run_warm: Callable, runs: dict[str, Path], options: list[object], tmp_path: Path
) -> None:
    other, config = _few(tmp_path), runs["vae"] / "config.yaml"
    whole = config.read_text()
    config.write_text(re.sub(r"(?m)^  shards: .*$", f"  shards: {other}", whole))
    for script in ("evaluate.py", "explore.py"):
        error = error_of(run_warm(LAUNCH / script, runs["vae"]))
        assert f"was trained on other images than data.shards {other} holds" in error
    config.write_text(whole)  # the remedy of the message
    done = run_warm(EVALUATE, runs["vae"], *options, "--metrics", "bits_per_dim")
    assert done.code == 0, done.stderr


def test_a_run_still_being_written_is_evaluated_with_a_note(
    run_warm: Callable, runs: dict[str, Path], options: list[object]
) -> None:
    run = runs["diffusion"]
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(re.sub(r"total_images: \d+", "total_images: 9999", config))
    (run / "metrics.jsonl").touch()
    done = run_warm(EVALUATE, run, *options, "--metrics", "class_consistency")
    assert done.code == 0, done.stderr
    assert f"{run} is still being written: evaluating its checkpoint of 256" in done.stdout


def test_a_checkpoint_that_vanishes_gives_way_to_the_next(
    runs: dict[str, Path], engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs["vae"]
    older, newer = (run / "checkpoints" / name for name in ("000000256", "000000999"))
    plain = checkpoint.read

    def vanishing(path: Path) -> checkpoint.Checkpoint:
        shutil.rmtree(newer, ignore_errors=True)
        return plain(path)

    monkeypatch.setattr(load_run.checkpoint, "read", vanishing)
    shutil.copytree(older, newer)
    assert load_run_on_all(engine, run, None).images_seen == 256
    shutil.copytree(older, newer)
    with pytest.raises(ValueError, match=r"000000999 was removed while it was read.*newest"):
        load_run_on_all(engine, run, "999")


def test_bits_per_dim_of_a_flow_are_exact_and_a_vaes_tighter_bound_is_below_the_other(
    run_warm: Callable, tiny_run: Callable[[str], Path]
) -> None:
    words = ["--metrics", "bits_per_dim", "--num_test", 40]
    flow = run_warm(EVALUATE, tiny_run("flow"), *words)
    assert flow.code == 0, flow.stderr
    assert "bits per dim" in flow.stdout and "bits/dim, exact for dequantized data" in flow.stdout
    vae = run_warm(EVALUATE, tiny_run("vae"), *words, "--importance_samples", 20)
    assert vae.code == 0, vae.stderr
    bits = found_in(tiny_run("vae"))["bits_per_dim"]
    assert bits["num_test_images"] == 40 and bits["importance_samples"] == 20
    assert bits["importance_weighted"] < bits["bound"]
    assert bits["reconstruction_nll"] + bits["kl"] == pytest.approx(bits["bound"])
