"""The exercises: their files are validated, runs are trained once, pages show the outcomes."""

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
from errors import error_of
from tiny import LAUNCH

from dgm.cli.exercise_plan import FOLDER, names_of_exercises, read_plan
from dgm.cli.exercises import choose, make_parser
from dgm.common.errors import UserError

SCRIPT = LAUNCH / "exercises.py"
GOOD: dict[str, Any] = {
    "title": "Two seeds",
    "question": "Which?",
    "trainer": "vae",
    "groups": {"plain": {"set": {"vae.beta": 1.0}}, "soft": {"set": {"vae.beta": 0.5}}},
    "scales": {"small": {"config": "vae_tiny.yaml", "set": {"train.total_images": 64}}},
    "expect": [
        {"hypothesis": "less", "lower": "final train/beta", "of": "soft", "baseline": "plain"}
    ],
    "compare": ["final train/loss", "wall time"],
    "rank_by": ["final train/loss"],
    "min": True,
    "show": ["samples"],
}


def written(folder: Path, content: object = GOOD, name: str = "one") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("scale", ["small", "medium", "full"])
def test_every_exercise_can_start_at_every_scale(scale: str) -> None:
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
def test_every_exercise_has_hypotheses(name: str) -> None:
    plan = read_plan(FOLDER / f"{name}.yaml", "small")
    assert plan.exercise.hypotheses and plan.exercise.compare and plan.exercise.show


def test_further_runs_differ_in_their_seed(tmp_path: Path) -> None:
    content = {**GOOD, "scales": {"small": {**GOOD["scales"]["small"], "seeds": 2}}}
    content["scales"]["small"] |= {"measure": "--num_images 20", "post": ["sample --per_class 2"]}
    runs = read_plan(written(tmp_path, content), "small").runs
    assert [run.name for run in runs] == [
        "vae-plain", "vae-plain-seed1", "vae-soft", "vae-soft-seed1",
    ]  # fmt: skip
    assert runs[1].settings == {**runs[0].settings, "run.seed": 1}
    assert runs[0].commands == (("evaluate", "--num_images", "20"), ("sample", "--per_class", "2"))
    assert runs[1].commands == runs[0].commands[:1]


WRONG: list[tuple[object, str]] = [
    ("[", "is not valid YAML (line 1"),
    ("- a", "is not a YAML file of keys"),
    ({**GOOD, "titel": "x"}, "has an unknown key titel in the file"),
    ({**GOOD, "title": ""}, "has title '': give text"),
    ({**GOOD, "groups": {}}, "has no groups"),
    ({**GOOD, "groups": {"a": {"sett": {}}}}, "has an unknown key sett in groups.a"),
    ({**GOOD, "groups": {"a": 3}}, "has a '3': give keys and values"),
    ({**GOOD, "trainer": "rnn"}, "has trainer rnn for group plain: choose from ddpm, gan, vae"),
    ({**GOOD, "scales": {"small": {"seed": 2}}}, "has an unknown key seed in scales.small"),
    ({**GOOD, "scales": {"huge": {}}}, "has no scale small: choose from huge"),
    ({**GOOD, "scales": {"small": {"config": "a", "seeds": 0}}}, "has seeds 0 at scale small"),
    ({**GOOD, "scales": {"small": {"config": "a", "post": ["rm -r"]}}}, "runs 'rm': choose"),
    ({**GOOD, "scales": {"small": {"config": "a", "measure": "'x"}}}, "which is not a command"),
    ({**GOOD, "show": ["sounds"]}, "shows 'sounds': choose from samples"),
    ({**GOOD, "show": "samples"}, "has show 'samples': give a list"),
    ({**GOOD, "compare": ["fd"]}, "names the metric 'fd'"),
    ({**GOOD, "expect": ["x"]}, "expects 'x'"),
    ({**GOOD, "expect": [{"hypothesis": "x", "of": "soft", "baseline": 1}]}, "neither lower nor"),
    ({**GOOD, "expect": [{**GOOD["expect"][0], "baseline": "deep"}]}, "on group deep, which"),
    ({**GOOD, "expect": [{**GOOD["expect"][0], "baseline": True}]}, "has baseline 'True'"),
    ({**GOOD, "groups": {"a": {"like": "two.yaml", "group": "b"}}}, "two.yaml cannot be read"),
    ({**GOOD, "groups": {"a": {"like": "one.yaml", "group": "b"}}}, "takes group b from one.yaml"),
    ({**GOOD, "groups": {"a": {"like": "one.yaml", "group": "a"}}}, "take it from there"),
    ({**GOOD, "scales": {"small": {"config": "a", "post": ["sample --per_klass 2"]}}}, "per_klass"),
]


@pytest.mark.parametrize(("content", "message"), WRONG, ids=[message for _, message in WRONG])
def test_a_wrong_file_is_a_one_line_error(tmp_path: Path, content: object, message: str) -> None:
    path = written(tmp_path, content)
    with pytest.raises(UserError, match=re.escape(message)) as raised:
        read_plan(path, "small")
    assert "\n" not in str(raised.value) and str(tmp_path) in str(raised.value)


def test_a_wrong_key_of_a_run_is_found_before_anything_is_trained(tmp_path: Path) -> None:
    wrong = {**GOOD, "groups": {"plain": {"set": {"vae.betta": 1.0}}}, "expect": []}
    own = written(tmp_path / "own", wrong).parent
    with pytest.raises(UserError, match=r"vae\.betta"):
        choose(make_parser().parse_args(["--exercises", str(own)]))


@pytest.mark.slow
def test_runs_are_trained_once_and_compared_on_a_page(
    run_warm: Callable, shape_pictures: Path, tmp_path: Path
) -> None:
    small = {**GOOD["scales"]["small"], "measure": "--metrics cost --num_images 20"}
    own = written(tmp_path / "own", {**GOOD, "scales": {"small": small}}).parent
    words = ["--exercises", own, "--data", f"folder:{shape_pictures}", "--parallel", 2]
    done = run_warm(SCRIPT, *words, "--out", "out", cwd=tmp_path)  # without test images
    assert done.code == 2 and "with --holdout 0.1 " in done.stderr
    assert not (tmp_path / "out").exists() and not (tmp_path / "data").exists()
    words += ["--holdout", 0.2, "--resize", 16]
    done = run_warm(SCRIPT, *words, "--out", "out", cwd=tmp_path, timeout=300)
    assert done.code == 0, done.stderr
    page = (tmp_path / "out" / "one.html").read_text()
    config = yaml.safe_load((tmp_path / "out" / "vae-soft" / "config.yaml").read_text())
    assert (config["data"]["holdout"], config["data"]["resize"]) == (0.2, 16)
    assert "Two seeds: out/one.html" in done.stdout and "train vae-soft: " in done.stdout
    assert "<td>held</td>" in page and "(2 times)" in page and "Best is " in page
    # The same command again repeats nothing, and writes the same page.
    logs = {path: path.read_bytes() for path in (tmp_path / "out" / "logs").iterdir()}
    again = run_warm(SCRIPT, *words, "--out", "out", cwd=tmp_path)
    assert again.code == 0 and "train" not in again.stdout
    assert {path: path.read_bytes() for path in logs} == logs
    assert (tmp_path / "out" / "one.html").read_text() == page
    # A failed run is reported with its own error and exit code.
    (tmp_path / "out" / "vae-soft" / "config.yaml").write_text("vae: {beta: 2.0}\n")
    done_file = tmp_path / "out" / "done.jsonl"
    lines = [line for line in done_file.read_text().splitlines() if "vae-soft" not in line]
    done_file.write_text("".join(line + "\n" for line in lines))
    error = error_of(run_warm(SCRIPT, *words, "--out", "out", cwd=tmp_path))
    assert error.startswith("error: train vae-soft ended with code 2")
    assert "holds a run with another configuration" in error


@pytest.mark.slow
def test_a_stopped_command_continues_where_it_was(
    shape_pictures: Path, tmp_path: Path, user_environment: dict[str, str]
) -> None:
    scale = {**GOOD["scales"]["small"], "set": {"train.total_images": 10**6}}
    own = written(tmp_path / "own", {**GOOD, "scales": {"small": scale}}).parent
    words = [sys.executable, SCRIPT, "--exercises", own, "--data", f"folder:{shape_pictures}"]
    process = subprocess.Popen(
        [*words, "--holdout=0.2", "--out=out", "--parallel=1"], cwd=tmp_path, env=user_environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    metrics = tmp_path / "out" / "vae-plain" / "metrics.jsonl"
    end = time.monotonic() + 100
    while not (metrics.exists() and metrics.read_text()) and time.monotonic() < end:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75 and "stopped: `python launch/exercises.py" in errors
    assert "continues" in errors
    saved = list((tmp_path / "out" / "vae-plain" / "checkpoints").glob("*/manifest.json"))
    assert len(saved) == 1  # the run saved when it was stopped
    last = json.loads(metrics.read_text().splitlines()[-1])["images_seen"]
    assert int(saved[0].parent.name) >= last
    assert not (tmp_path / "out" / "vae-soft").exists()
