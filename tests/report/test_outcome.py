"""What came out of exercises is computed from run folders, and never claimed without figures."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from statistics import stdev
from typing import Any

import pytest
from written_runs import write_run

from dgm.report.exercise import Exercise, exercise_page
from dgm.report.figure_names import read_measure
from dgm.report.hypothesis_check import Expectation, judge, measure_group, name_best
from dgm.report.read_run import Run, read_run

FD = read_measure("distances_cifar/fd_cifar")


def value_of(run: Run, text: str) -> float | None:
    return read_measure(text).of(run)


def opened(folder: Path, fd: float | None = None, family: str = "gan", **more: Any) -> Run:
    write_run(folder, [3.0, 1.0, 2.0, 2.5], family=family)
    if fd is not None:
        found = {"distances_cifar": {"fd_cifar": fd, **more}}
        (folder / "evaluation.json").write_text(json.dumps(found))
    return read_run(folder, folder.name, family, {})


def expects(than: str | float, lower: bool = True, measure: str = FD.key) -> Expectation:
    return Expectation("a is better", read_measure(measure), lower, "a", than)


def test_measures_are_read_from_logs_and_files(tmp_path: Path) -> None:
    run = opened(tmp_path / "a", 4.0)
    assert FD.of(run) == 4.0
    assert value_of(run, "final train/loss") == 2.5
    assert value_of(run, "least train/loss") == 1.0
    assert value_of(run, "least after train/loss") == 0.5
    assert value_of(run, "wall time") == 8.0
    assert value_of(run, "images/s") == 50.0
    assert value_of(run, "least eval/nothing") is None
    assert value_of(run, "bits per dimension") is None
    (run.folder / "denoised").mkdir()
    (run.folder / "denoised" / "denoising.json").write_text(
        json.dumps({"steps": [{"steps": 50, "psnr_db_denoised": 21.5}]})
    )
    assert value_of(run, "denoised 50/psnr_db_denoised") == 21.5
    assert value_of(run, "denoised 10/psnr_db_denoised") is None
    (run.folder / "denoised" / "denoising.json").write_text("[")
    assert value_of(run, "denoised 50/psnr_db_denoised") is None


def test_bits_are_exact_before_they_are_a_bound(tmp_path: Path) -> None:
    run = opened(tmp_path / "a")
    run.evaluation["bits_per_dim_ode"] = {"bound": 5.0}
    assert value_of(run, "bits per dimension") == 5.0
    run.evaluation["bits_per_dim"] = {"exact": 3.0}
    assert value_of(run, "bits per dimension") == 3.0
    assert "exact for dequantised data" in read_measure("bits per dimension").name
    assert read_measure("bits_per_dim/exact").name == "bits/dim, exact for dequantised data"


@pytest.mark.parametrize(
    "text", ["fd", "worst train/loss", "denoised x/psnr", "spread of nothing", "a/", "/a"]
)
def test_what_is_no_measure_is_seen_before_anything_runs(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text.removeprefix("spread of "))):
        read_measure(text)


@pytest.mark.parametrize(
    ("text", "name", "higher", "written"),
    [
        (FD.key, "FD-cifar", False, "0.25 ± 0.12"),
        ("class_consistency/class_consistency", "class consistency", True, "25.0 % ± 12.5 %"),
        ("bits_per_dim/bound", "bits/dim, bound", False, "0.25 ± 0.12"),
        ("diversity_cifar/diversity", "diversity", None, "0.25 ± 0.12"),
        (
            "reconstruction/rms_error_grey_levels", "reconstruction: error in grey levels", False,
            "0.25 ± 0.12",
        ),
        (
            "denoised 50/psnr_db_denoised", "PSNR, dB, denoised from 50 steps of noise", True,
            "0.25 ± 0.12",
        ),
        ("least after train/loss", "least after train/loss", None, "25.0 % ± 12.5 %"),
        (f"spread of {FD.key}", "spread over runs of FD-cifar", False, "25.0 % ± 12.5 %"),
        ("wall time", "wall time", False, "0.2 s ± 0.1 s"),
        ("images/s", "images/s", True, "0.25 ± 0.12"),
    ],
)  # fmt: skip
def test_a_measure_is_written_as_people_do(
    text: str, name: str, higher: bool | None, written: str
) -> None:
    measure = read_measure(text)
    assert (measure.name, measure.higher) == (name, higher)
    assert measure.write(0.25, 0.125) == written


def test_an_expectation_holds_or_does_not_by_its_figures(tmp_path: Path) -> None:
    groups = {"a": [opened(tmp_path / "a", 2.0)], "b": [opened(tmp_path / "b", 3.0)]}
    assert judge(expects("b"), groups) == ("held", "a 2, b 3 (1.5 times)")
    assert judge(expects("b", lower=False), groups)[0] == "did not hold"
    assert judge(expects(1.5), groups) == ("did not hold", "a 2, the bound 1.5")
    assert judge(expects("b", measure="cost/nothing"), groups)[0] == "not measured"
    groups["c"] = [opened(tmp_path / "c", 2.0001)]  # one run each: nobody knows how they scatter
    assert judge(expects("c"), groups) == ("too close to tell", "a 2, c 2")


def test_what_seeds_scatter_by_is_no_outcome(tmp_path: Path) -> None:
    values = {"a": [2.0, 4.0], "b": [3.0, 4.5]}
    groups = {
        name: [opened(tmp_path / f"{name}{k}", fd) for k, fd in enumerate(own)]
        for name, own in values.items()
    }
    value = measure_group(groups["a"], FD)
    assert value is not None and value.spread == stdev([2.0, 4.0])
    assert value.error == pytest.approx(stdev([2.0, 4.0]) / math.sqrt(2))
    assert judge(expects("b"), groups)[0] == "too close to tell"
    spread = measure_group(groups["a"], read_measure(f"spread of {FD.key}"))
    assert spread is not None and spread.mean == pytest.approx(stdev([2.0, 4.0]) / 3)
    assert measure_group(groups["a"][:1], read_measure(f"spread of {FD.key}")) is None
    # Of one run, the scatter over seeds of its images.
    more = {"num_seeds": 4, "spread_over_seeds": {"fd_cifar": 1.0}}
    one = {"a": [opened(tmp_path / "c", 2.0, **more)], "b": [opened(tmp_path / "d", 2.9)]}
    assert judge(expects("b"), one) == ("too close to tell", "a 2 ± 1, b 2.9 (1.45 times)")


def test_the_best_is_named_with_its_figures(tmp_path: Path) -> None:
    fds = {"a": 2.0, "b": 3.0, "c": 4.0}
    groups = {name: [opened(tmp_path / name, fd, score_cifar=fd)] for name, fd in fds.items()}
    measures = [FD, *map(read_measure, ("final train/loss", "distances_cifar/score_cifar"))]
    # a: 1 + 1 + 3, b: 2 + 1 + 2, c: 3 + 1 + 1: equal, and the first measure decides.
    said = name_best(groups, measures)
    assert said[0].startswith("Best is a, by the sum of its places in 3 measures (a 5, b 5, c 5")
    assert said[1] == "In FD-cifar it is first: 2 against 3 of b."
    assert said[2] == "In final train/loss it is level with b: 2.5 against 2.5 of b."
    assert said[3] == "In score-cifar it is third: 2 against 4 of c."
    assert name_best({**groups, "d": [opened(tmp_path / "d")]}, measures) == []
    assert name_best({"a": groups["a"]}, measures) == [] == name_best(groups, [])


def test_the_page_shows_what_was_expected_and_escapes_it(tmp_path: Path) -> None:
    groups = {
        "<a>": [opened(tmp_path / "a", 2.0)],
        "b": [opened(tmp_path / "b", 3.0)],
        "c": [opened(tmp_path / "c")],
    }
    exercise = Exercise(
        title="One <i>",
        asks="Which & why?",
        expectations=[Expectation("<b>less</b>", FD, True, "<a>", "b")],
        compare=[FD, read_measure("wall time")],
        rank_by=[FD],
        least=True,
        show=["samples", "generated", "reconstructions", "denoised"],
    )
    page = exercise_page(exercise, groups, ["python", "x.py", "--data", "folder:a b"])
    for text in ("One &lt;i&gt;", "Which &amp; why?", "&lt;b&gt;less&lt;/b&gt;", "held"):
        assert text in page
    assert "<i>" not in page and "<b>" not in page
    assert "python x.py --data &#x27;folder:a b&#x27;" in page
    assert "100 images" not in page and "200 images" in page  # where the loss was least
    assert "Best is" not in page  # c was not measured
    compared = page[page.index("<h2>Compared") : page.index("<h2>The least of each loss")]
    assert re.findall(r'best"[^>]*>([^<]*)', compared) == ["2"] and "&#8211;" in compared
