"""The exercises: their files are read with care, runs are trained once, pages say what came out."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from dgm.cli.exercise_plan import FOLDER, names_of_exercises, read_plan
from dgm.cli.exercises import choose, make_parser
from dgm.common.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "exercises.py"
GOOD: dict[str, Any] = {
    "title": "Two seeds",
    "asks": "Which?",
    "trainer": "vae",
    "groups": {"plain": {"set": {"vae.beta": 1.0}}, "soft": {"set": {"vae.beta": 0.5}}},
    "scales": {"small": {"config": "vae_tiny.yaml", "set": {"train.total_images": 64}}},
    "expect": [{"says": "less", "lower": "final train/beta", "of": "soft", "than": "plain"}],
    "compare": ["final train/loss", "wall time"],
    "rank_by": ["final train/loss"],
    "least": True,
    "show": ["samples"],
}


def written(folder: Path, told: object = GOOD, name: str = "one") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.yaml"
    path.write_text(told if isinstance(told, str) else yaml.safe_dump(told))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("scale", ["small", "medium", "full"])
def test_every_exercise_can_be_begun_at_every_scale(scale: str) -> None:
    options = make_parser().parse_args(["--scale", scale])
    plans = choose(options)
    assert [plan.name for plan in plans] == names_of_exercises()
    assert {"families", "week1_gan", "week2_vae", "week3_diffusion"} == {p.name for p in plans}
    by_name = {plan.name: plan for plan in plans}
    assert len(by_name["week2_vae"].runs) == 4 and len(by_name["week3_diffusion"].runs) == 2
    # The families are the weeks' own runs, and further seeds of them.
    families = {run.name: run for run in by_name["families"].runs}
    weeks = ["week2_vae", "week3_diffusion"] + ["week1_gan"] * (scale != "small")
    for week in weeks:
        shared = [run for run in by_name[week].runs if run.name in families]
        assert len(shared) == 1
        assert families[shared[0].name].settings == shared[0].settings
    assert {run.group for run in families.values()} == {"diffusion", "gan", "vae", "flow"}
    rates = {run.settings.get("optim.lr") for run in by_name["week3_diffusion"].runs}
    assert len(rates) == 2


@pytest.mark.parametrize("name", names_of_exercises())
def test_every_exercise_says_what_it_expects(name: str) -> None:
    plan = read_plan(FOLDER / f"{name}.yaml", "small")
    assert plan.exercise.expectations and plan.exercise.compare and plan.exercise.show


def test_further_runs_differ_in_their_seed(tmp_path: Path) -> None:
    told = {**GOOD, "scales": {"small": {**GOOD["scales"]["small"], "seeds": 2}}}
    told["scales"]["small"] |= {"measure": "--num_images 20", "then": ["sample --per_class 2"]}
    runs = read_plan(written(tmp_path, told), "small").runs
    assert [run.name for run in runs] == [
        "vae-plain", "vae-plain-seed1", "vae-soft", "vae-soft-seed1",
    ]  # fmt: skip
    assert runs[1].settings == {**runs[0].settings, "run.seed": 1}
    assert runs[0].then == (("evaluate", "--num_images", "20"), ("sample", "--per_class", "2"))
    assert runs[1].then == runs[0].then[:1]


WRONG: list[tuple[object, str]] = [
    ("[", "is not YAML in line 1"),
    ("- a", "is not a YAML file of keys"),
    ({**GOOD, "titel": "x"}, "has an unknown key titel in the file"),
    ({**GOOD, "title": ""}, "has title '': give a text"),
    ({**GOOD, "groups": {}}, "has no groups"),
    ({**GOOD, "groups": {"a": {"sett": {}}}}, "has an unknown key sett in groups.a"),
    ({**GOOD, "groups": {"a": 3}}, "has a '3': give keys and values"),
    ({**GOOD, "trainer": "rnn"}, "has trainer rnn for group plain: choose of ddpm, gan, vae, flow"),
    ({**GOOD, "scales": {"small": {"seed": 2}}}, "has an unknown key seed in scales.small"),
    ({**GOOD, "scales": {"huge": {}}}, "has no scale small: choose of huge"),
    ({**GOOD, "scales": {"small": {"config": "a", "seeds": 0}}}, "has seeds 0 at scale small"),
    ({**GOOD, "scales": {"small": {"config": "a", "then": ["rm -r"]}}}, "then runs 'rm'"),
    ({**GOOD, "scales": {"small": {"config": "a", "measure": "'x"}}}, "which is no command"),
    ({**GOOD, "show": ["sounds"]}, "shows 'sounds': choose of samples"),
    ({**GOOD, "show": "samples"}, "has show 'samples': give a list"),
    ({**GOOD, "compare": ["fd"]}, "names the measure 'fd'"),
    ({**GOOD, "expect": ["x"]}, "expects 'x'"),
    ({**GOOD, "expect": [{"says": "x", "of": "soft", "than": 1}]}, "neither lower nor higher"),
    ({**GOOD, "expect": [{**GOOD["expect"][0], "than": "deep"}]}, "of group deep, which it does"),
    ({**GOOD, "expect": [{**GOOD["expect"][0], "than": True}]}, "something than 'True'"),
    ({**GOOD, "groups": {"a": {"like": "two.yaml", "group": "b"}}}, "two.yaml cannot be read"),
    ({**GOOD, "groups": {"a": {"like": "one.yaml", "group": "b"}}}, "takes group b of one.yaml"),
    ({**GOOD, "groups": {"a": {"like": "one.yaml", "group": "a"}}}, "take it from there"),
    ({**GOOD, "scales": {"small": {"config": "a", "then": ["sample --per_klass 2"]}}}, "per_klass"),
]


@pytest.mark.parametrize(("told", "said"), WRONG, ids=[said for _, said in WRONG])
def test_a_wrong_file_is_told_in_one_line(tmp_path: Path, told: object, said: str) -> None:
    path = written(tmp_path, told)
    with pytest.raises(UserError, match=re.escape(said)) as raised:
        read_plan(path, "small")
    assert "\n" not in str(raised.value) and str(tmp_path) in str(raised.value)


@pytest.mark.slow
def test_mistakes_are_one_line_and_leave_nothing(run_warm: Callable, tmp_path: Path) -> None:
    wrong = {**GOOD, "groups": {"plain": {"set": {"vae.betta": 1.0}}}, "expect": []}
    own = written(tmp_path / "own", wrong).parent
    mistakes: dict[tuple[object, ...], str] = {
        ("--only", "week9"): "--only names 'week9': choose of families, week1_gan",
        ("--scale", "huge"): "has no scale huge: choose of small, medium, full",
        ("--parallel", 0): "--parallel is 0: choose 1 to 1024",
        ("--exercises", tmp_path / "none"): "holds no exercise: name a folder of them",
        ("--exercises", own): "vae.betta",
        ("--data", "mnist"): "mnist",
    }
    for words, said in mistakes.items():
        done = run_warm(SCRIPT, *words, "--out", tmp_path / "out")
        lines = done.stderr.strip().splitlines()
        assert done.code == 2 and len(lines) == 1, (words, done.stderr)
        assert lines[0].startswith("error: ") and said in lines[0], lines
        assert not (tmp_path / "out").exists()
    (tmp_path / "out").write_text("")
    done = run_warm(SCRIPT, "--out", tmp_path / "out" / "here")
    assert done.code == 2 and "is no folder: name another path" in done.stderr


@pytest.fixture
def pictures(shape_pictures: Path, tmp_path: Path) -> Path:
    """Give a folder of train and test images."""
    root = tmp_path / "pictures"
    root.mkdir()
    for split in ("train", "test"):
        (root / split).symlink_to(shape_pictures)
    return root


@pytest.mark.slow
def test_runs_are_trained_once_and_answered_by_a_page(
    run_script: Callable, shape_pictures: Path, tmp_path: Path
) -> None:
    (tmp_path / "pictures").symlink_to(shape_pictures)
    scale = GOOD["scales"]["small"]
    more = {"measure": "--measure cost --num_images 20", "then": ["sample"]}
    told = {**GOOD, "scales": {"small": {**scale, **more}}, "show": ["samples", "generated"]}
    own = written(tmp_path / "own", told).parent
    words = ["--exercises", own, "--data", f"folder:{tmp_path}/pictures", "--parallel", 2]
    done = run_script(SCRIPT, *words, "--out", "out", cwd=tmp_path)  # without test images
    assert done.code == 2 and "by --holdout 0.1 " in done.stderr
    assert not (tmp_path / "out").exists() and not (tmp_path / "data").exists()
    words += ["--holdout", 0.2, "--resize", 16]
    done = run_script(SCRIPT, *words, "--out", "out", cwd=tmp_path, timeout=300)
    assert done.code == 0, done.stderr
    page = (tmp_path / "out" / "one.html").read_text()
    config = yaml.safe_load((tmp_path / "out" / "vae-soft" / "config.yaml").read_text())
    assert (config["data"]["holdout"], config["data"]["resize"]) == (0.2, 16)
    assert "Two seeds: out/one.html" in done.stdout and "train vae-soft: " in done.stdout
    assert "<td>held</td>" in page and "(2 times)" in page and "Best is " in page
    # Asked again, nothing is done a second time; the page is the same.
    logs = {path: path.read_bytes() for path in (tmp_path / "out" / "logs").iterdir()}
    again = run_script(SCRIPT, *words, "--out", "out", cwd=tmp_path)
    assert again.code == 0 and "train" not in again.stdout
    assert {path: path.read_bytes() for path in logs} == logs
    assert (tmp_path / "out" / "one.html").read_text() == page
    # What goes wrong in a run is told with the run's own words, and its code.
    (tmp_path / "out" / "vae-soft" / "config.yaml").write_text("vae: {beta: 2.0}\n")
    done_file = tmp_path / "out" / "done.jsonl"
    lines = [line for line in done_file.read_text().splitlines() if "vae-soft" not in line]
    done_file.write_text("".join(line + "\n" for line in lines))
    failed = run_script(SCRIPT, *words, "--out", "out", cwd=tmp_path)
    assert failed.code == 2 and len(failed.stderr.strip().splitlines()) == 1
    assert "error: train vae-soft ended with code 2" in failed.stderr
    assert "holds a run with another configuration" in failed.stderr


@pytest.mark.slow
def test_stopped_it_goes_on_where_it_was(
    pictures: Path, tmp_path: Path, user_environment: dict[str, str]
) -> None:
    scale = {**GOOD["scales"]["small"], "set": {"train.total_images": 10**6}}
    own = written(tmp_path / "own", {**GOOD, "scales": {"small": scale}}).parent
    words = [sys.executable, SCRIPT, "--exercises", own, "--data", f"folder:{pictures}"]
    process = subprocess.Popen(
        [*words, "--out", "out", "--parallel", "1"], cwd=tmp_path, env=user_environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    metrics = tmp_path / "out" / "vae-plain" / "metrics.jsonl"
    end = time.monotonic() + 100
    while not (metrics.exists() and metrics.read_text()) and time.monotonic() < end:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75 and "stopped: `python launch/exercises.py" in errors
    assert "goes on" in errors
    saved = list((tmp_path / "out" / "vae-plain" / "checkpoints").glob("*/manifest.json"))
    assert len(saved) == 1  # the run saved as it was asked to end
    last = json.loads(metrics.read_text().splitlines()[-1])["images_seen"]
    assert int(saved[0].parent.name) >= last
    assert not (tmp_path / "out" / "vae-soft").exists()
