"""`launch/sample.py` on a tiny trained run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from errors import error_of
from PIL import Image
from tiny import LAUNCH
from warm_processes import Result

from dgm.cli.path_checks import Outputs, choose_outputs

SAMPLE = LAUNCH / "sample.py"

pytestmark = pytest.mark.slow


@pytest.fixture
def trained(tiny_run: Callable[[str], Path]) -> Path:
    return tiny_run("diffusion")


@pytest.fixture
def sample(run_warm: Callable, trained: Path, tmp_path: Path) -> Callable[..., Result]:
    """Return a function that samples from the run in the working directory `tmp_path`."""

    def start(*options: object, **how) -> Result:
        done = run_warm(SAMPLE, trained, *options, cwd=tmp_path, **how)
        assert done.code == 0, done.stderr
        return done

    return start


def arrays(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return file["arr_0"], file["arr_1"]


def test_one_image_per_class_by_default(sample: Callable, tmp_path: Path) -> None:
    sample("--out", "one")
    pixels, labels = arrays(tmp_path / "one.npz")
    assert pixels.shape == (10, 32, 32, 3) and pixels.dtype == np.uint8
    assert labels.tolist() == list(range(10))
    width, height = Image.open(tmp_path / "one.png").size
    assert width > 9 * height  # one row of ten


def test_image_k_of_a_class_is_the_same_whatever_the_batch_count_and_processes(
    sample: Callable, tmp_path: Path
) -> None:
    variants: dict[str, tuple[list[object], int]] = {
        "whole": (["--per_class", 4], 1),
        "batches_of_3": (["--per_class", 4, "--batch", 3], 1),
        "two_processes": (["--per_class", 4], 2),
        "other_count": (["--per_class", 2], 1),
    }
    arrays_of = {}
    for name, (options, processes) in variants.items():
        sample("--steps", 3, "--out", name, *options, processes=processes)
        arrays_of[name] = arrays(tmp_path / f"{name}.npz")[0].reshape(10, -1, 32, 32, 3)
    whole = arrays_of.pop("whole").astype(int)
    assert np.abs(whole[:, 0] - whole[:, 1]).max() > 20  # images of a class differ
    for name, images in arrays_of.items():
        # Another batch size may round differently, which one grey level bounds.
        difference = np.abs(whole[:, : images.shape[1]] - images.astype(int))
        assert difference.max() <= 1, name


@pytest.mark.parametrize("given", ["x.png", "x.npz", "x", "x.PNG"])
def test_a_grid_and_an_array_have_the_name_of_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert choose_outputs("--out", given) == Outputs(Path("x.png"), Path("x.npz"))


def test_a_folder_gets_single_images_that_are_those_of_the_array(
    sample: Callable, run_warm: Callable, trained: Path, tmp_path: Path
) -> None:
    options = ["--per_class", 2, "--classes", "1, 3"]
    options += ["--sampler", "heun", "--steps", 3, "--guidance", 2]
    sample(*options, "--out", "new/made/")
    folder = tmp_path / "new" / "made"
    pixels, labels = arrays(folder / "images.npz")
    assert labels.tolist() == [1, 1, 3, 3]
    names = sorted(p.name for p in folder.glob("*.png"))
    assert len(names) == 4 and len(list(folder.iterdir())) == 5
    assert all(name.endswith(("-00000.png", "-00001.png")) for name in names)
    kept = {np.asarray(Image.open(folder / name)).tobytes() for name in names}
    assert kept == {image.tobytes() for image in pixels}
    # Files are not overwritten, nor mixed with other images; an empty folder can be used.
    before = {p: p.read_bytes() for p in folder.iterdir()}
    for out in ("new/made/", "new/made"):
        refused = run_warm(SAMPLE, trained, *options, "--seed", 1, "--out", out, cwd=tmp_path)
        assert "name a new or empty folder" in error_of(refused)
    assert {p: p.read_bytes() for p in folder.iterdir()} == before
    (tmp_path / "empty").mkdir()
    sample(*options, "--out", "empty")
    assert len(list((tmp_path / "empty").glob("*.png"))) == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "new"]


def test_images_without_classes_are_numbered(
    run_warm: Callable, tiny_run: Callable, tmp_path: Path
) -> None:
    done = run_warm(SAMPLE, tiny_run("flow"), "--per_class", 1, "--out", "made/", cwd=tmp_path)
    assert done.code == 0, done.stderr
    names = sorted(p.name for p in (tmp_path / "made").iterdir())
    assert names == [*(f"{k:05d}.png" for k in range(10)), "images.npz"]


def test_unknown_names_get_a_suggestion(run_warm: Callable, trained: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    (runs / "sweep").mkdir(parents=True)
    (runs / "small-ddpm").symlink_to(trained)
    (runs / "sweep" / "lr=0.1").symlink_to(trained)
    mistakes = {
        "small-ddpm": "did you mean runs/small-ddpm?",
        "runs/small-ddpm/checkpoints": "did you mean runs/small-ddpm?",
        "runs/sweep": "it holds runs, name one: runs/sweep/lr=0.1",
        "runs/sweep/lr=0.2": "did you mean runs/sweep/lr=0.1?",
    }
    for name, hint in mistakes.items():
        assert hint in error_of(run_warm(SAMPLE, name, cwd=tmp_path)), name
