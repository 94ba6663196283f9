"""Outcomes of exercises are computed from run folders, never claimed without values."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from statistics import stdev
from typing import Any

import pytest
from written_runs import opened, write_run

from dgm.report.exercise import Exercise, exercise_page
from dgm.report.hypothesis_check import (
    Hypothesis,
    check_hypothesis,
    measure_group,
    name_best,
    parse_metric,
)
from dgm.report.read_run import Run

FD = parse_metric("distances_classifier/fd_classifier")


def value_of(run: Run, text: str) -> float | None:
    return parse_metric(text).read(run)


def made(folder: Path, fd: float | None = None, **more: Any) -> Run:
    write_run(folder, [3.0, 1.0, 2.0, 2.5])
    if fd is not None:
        found = {"distances_classifier": {"fd_classifier": fd, **more}}
        (folder / "evaluation.json").write_text(json.dumps(found))
    return opened(folder)


def expects(baseline: str | float, lower: bool = True, metric: str = FD.key) -> Hypothesis:
    return Hypothesis("a is better", parse_metric(metric), lower, "a", baseline)


def test_metrics_are_read_from_logs_and_files(tmp_path: Path) -> None:
    run = made(tmp_path / "a", 4.0)
    denoised = run.folder / "denoised" / "denoising.json"
    denoised.parent.mkdir()
    denoised.write_text(json.dumps({"steps": [{"steps": 50, "psnr_db_denoised": 21.5}]}))
    values = {
        FD.key: 4.0, "final train/loss": 2.5, "min train/loss": 1.0, "min after train/loss": 0.5,
        "wall time": 8.0, "images/s": 50.0, "min eval/nothing": None, "bits per dimension": None,
        "denoised 50/psnr_db_denoised": 21.5, "denoised 10/psnr_db_denoised": None,
    }  # fmt: skip
    assert {name: value_of(run, name) for name in values} == values
    denoised.write_text("[")
    assert value_of(run, "denoised 50/psnr_db_denoised") is None


def test_exact_bits_are_preferred_to_a_bound(tmp_path: Path) -> None:
    run = made(tmp_path / "a")
    run.evaluation["bits_per_dim_ode"] = {"bound": 5.0}
    assert value_of(run, "bits per dimension") == 5.0
    run.evaluation["bits_per_dim"] = {"exact": 3.0}
    assert value_of(run, "bits per dimension") == 3.0
    assert "exact for dequantized data" in parse_metric("bits per dimension").name
    assert parse_metric("bits_per_dim/exact").name == "bits/dim, exact for dequantized data"


@pytest.mark.parametrize(
    "text", ["fd", "worst train/loss", "denoised x/psnr", "spread of nothing", "a/", "/a"]
)
def test_an_unknown_metric_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text.removeprefix("spread of "))):
        parse_metric(text)


@pytest.mark.parametrize(
    ("text", "name", "higher", "written"),
    [
        (FD.key, "FD-classifier", False, "0.25 ± 0.12"),
        ("class_consistency/class_consistency", "class consistency", True, "25.0 % ± 12.5 %"),
        ("bits_per_dim/bound", "bits/dim, bound", False, "0.25 ± 0.12"),
        ("diversity_classifier/diversity", "diversity", None, "0.25 ± 0.12"),
        ("reconstruction/rms_error_grey_levels", "reconstruction: error in grey levels", False,
         "0.25 ± 0.12"),
        ("denoised 50/psnr_db_denoised", "PSNR, dB, denoised from 50 steps of noise", True,
         "0.25 ± 0.12"),
        ("min after train/loss", "min after train/loss", None, "25.0 % ± 12.5 %"),
        (f"spread of {FD.key}", "spread over runs of FD-classifier", False, "25.0 % ± 12.5 %"),
        ("wall time", "wall time", False, "0.2 s ± 0.1 s"),
        ("images/s", "images/s", True, "0.25 ± 0.12"),
    ],
)  # fmt: skip
def test_a_metric_is_named_and_formatted(
    text: str, name: str, higher: bool | None, written: str
) -> None:
    metric = parse_metric(text)
    assert (metric.name, metric.higher_is_better) == (name, higher)
    assert metric.format(0.25, 0.125) == written


def test_a_hypothesis_holds_or_does_not_by_its_values(tmp_path: Path) -> None:
    groups = {"a": [made(tmp_path / "a", 2.0)], "b": [made(tmp_path / "b", 3.0)]}
    assert check_hypothesis(expects("b"), groups) == ("held", "a 2, b 3 (1.5 times)")
    assert check_hypothesis(expects("b", lower=False), groups)[0] == "did not hold"
    assert check_hypothesis(expects(1.5), groups) == ("did not hold", "a 2, the bound 1.5")
    assert check_hypothesis(expects("b", metric="cost/nothing"), groups)[0] == "not measured"
    groups["c"] = [made(tmp_path / "c", 2.0001)]  # one run each: no standard error
    assert check_hypothesis(expects("c"), groups) == ("too close to tell", "a 2, c 2")


def test_differences_within_the_spread_of_seeds_are_no_outcome(tmp_path: Path) -> None:
    values = {"a": [2.0, 4.0], "b": [3.0, 4.5]}
    groups = {
        name: [made(tmp_path / f"{name}{k}", fd) for k, fd in enumerate(own)]
        for name, own in values.items()
    }
    value = measure_group(groups["a"], FD)
    assert value is not None and value.spread == stdev([2.0, 4.0])
    assert value.error == pytest.approx(stdev([2.0, 4.0]) / math.sqrt(2))
    assert check_hypothesis(expects("b"), groups)[0] == "too close to tell"
    spread = measure_group(groups["a"], parse_metric(f"spread of {FD.key}"))
    assert spread is not None and spread.mean == pytest.approx(stdev([2.0, 4.0]) / 3)
    assert measure_group(groups["a"][:1], parse_metric(f"spread of {FD.key}")) is None
    # A single run is judged by the spread over the seeds of its generated images.
    more = {"num_seeds": 4, "spread_over_seeds": {"fd_classifier": 1.0}}
    one = {"a": [made(tmp_path / "c", 2.0, **more)], "b": [made(tmp_path / "d", 2.9)]}
    outcome = ("too close to tell", "a 2 ± 1, b 2.9 (1.45 times)")
    assert check_hypothesis(expects("b"), one) == outcome


def test_the_best_is_named_with_its_values(tmp_path: Path) -> None:
    fds = {"a": 2.0, "b": 3.0, "c": 4.0}
    groups = {name: [made(tmp_path / name, fd, score_classifier=fd)] for name, fd in fds.items()}
    metrics = [
        FD,
        *map(parse_metric, ("final train/loss", "distances_classifier/score_classifier")),
    ]
    # a: 1 + 1 + 3, b: 2 + 1 + 2, c: 3 + 1 + 1: equal, and the first measure decides.
    sentences = name_best(groups, metrics)
    assert sentences[0].startswith("Best is a, by the sum of its ranks in 3 metrics (a 5, b 5, c 5")
    assert sentences[1] == "In FD-classifier it is first: 2 against 3 of b."
    assert sentences[2] == "In final train/loss it equals b: 2.5 against 2.5 of b."
    assert sentences[3] == "In score-classifier it is third: 2 against 4 of c."
    assert name_best({**groups, "d": [made(tmp_path / "d")]}, metrics) == []
    assert name_best({"a": groups["a"]}, metrics) == [] == name_best(groups, [])


def test_the_page_shows_the_hypotheses_and_escapes_them(tmp_path: Path) -> None:
    groups = {
        "<a>": [made(tmp_path / "a", 2.0)],
        "b": [made(tmp_path / "b", 3.0)],
        "c": [made(tmp_path / "c")],
    }
    exercise = Exercise(
        title="One <i>",
        question="Which & why?",
        hypotheses=[Hypothesis("<b>less</b>", FD, True, "<a>", "b")],
        compare=[FD, parse_metric("wall time")],
        rank_by=[FD],
        min_losses=True,
        show=["samples", "generated", "reconstructions", "denoised"],
    )
    page = exercise_page(exercise, groups, ["python", "x.py", "--data", "folder:a b"])
    for text in ("One &lt;i&gt;", "Which &amp; why?", "&lt;b&gt;less&lt;/b&gt;", "held"):
        assert text in page
    assert "<i>" not in page and "<b>" not in page
    assert "python x.py --data &#39;folder:a b&#39;" in page
    assert "100 images" not in page and "200 images" in page  # where the minimum was
    assert "Best is" not in page  # c was not measured
    compared = page[page.index("<h2>Compared") : page.index("<h2>Minimum of each loss")]
    assert re.findall(r'best"[^>]*>([^<]*)', compared) == ["2"] and "&#8211;" in compared
