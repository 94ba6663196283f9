"""Sentences about curves follow from their values; some curves have none."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from written_runs import opened, write_run

from dgm.report.curve_summary import summarize_curves
from dgm.report.read_run import Run


def made(folder: Path, losses: list[float], family: str = "diffusion") -> Run:
    return opened(write_run(folder, losses, family=family), family=family)


def noisy(means: np.ndarray, scatter: float) -> list[float]:
    return (means + scatter * np.random.default_rng(0).standard_normal(len(means))).tolist()


def test_few_points_or_a_minimum_at_the_end_give_no_sentences(tmp_path: Path) -> None:
    few = [made(tmp_path / name, [3.0, 1.0, 2.0, 1.5]) for name in ("a", "b")]
    none, falling = (
        made(tmp_path / "c", []),
        made(tmp_path / "d", [1 - 0.01 * k for k in range(20)]),
    )
    for runs in (few, few[:1], [none], [falling]):
        assert summarize_curves(runs) == []


def test_minimum_and_the_last_value_in_percent_above_it(tmp_path: Path) -> None:
    finite = [2.0 - 0.1 * k for k in range(10)]
    losses = [*finite, math.nan, math.inf, 1.0, 1.25]  # what is not finite is left out
    assert summarize_curves([made(tmp_path / "a", losses)]) == [
        "train/loss had its minimum, 1, after 1,300 images; the last value, after 1,400 images, is "
        "1.25, 25.0 % above."
    ]


def test_a_negative_minimum_has_no_percent(tmp_path: Path) -> None:
    (sentence,) = summarize_curves([made(tmp_path / "a", [-1.0 - k for k in range(11)] + [-2.0])])
    assert "had its minimum, -11, after 1,100 images" in sentence and "%" not in sentence


def test_last_tenth_falls_rises_or_scatters(tmp_path: Path) -> None:
    k = np.arange(100)
    falling = summarize_curves([made(tmp_path / "a", noisy(5 - 0.04 * k, 0.01))])
    rising = summarize_curves([made(tmp_path / "b", noisy(1 + 0.04 * k, 0.01))])
    flat = summarize_curves([made(tmp_path / "c", noisy(1 + 0 * k, 0.1))])
    assert any("was still falling over the last tenth" in s for s in falling)
    assert any("was rising over the last tenth" in s for s in rising)
    assert any("no more than its scatter over the last tenth" in s for s in flat)
    assert not any("falling" in s for s in rising + flat)


def test_two_runs_are_compared_at_their_ends(tmp_path: Path) -> None:
    fast = made(tmp_path / "fast", [10.0 - 0.5 * k for k in range(16)])  # ends at 2.5
    slow = made(tmp_path / "slow", [10.0 - 0.4 * k for k in range(16)])  # ends at 4
    sentences = summarize_curves([slow, fast])
    assert sentences == [
        "train/loss of fast ended below that of slow: 2.5 after 1,600 images against 4 after "
        "1,600 images, 37.5 % lower.",
        "The final train/loss of slow, 4, was first reached by fast, after 1,300 images, and by "
        "slow after 1,600 images.",
        "train/loss of fast lies below that of slow from 200 images to 1,600 images.",
    ]


def test_last_crossing_is_where_the_lines_meet(tmp_path: Path) -> None:
    flat = made(tmp_path / "flat", [5.0] * 16)
    # It meets 5 between the 10th log (5.25) and the 11th (4.75).
    steep = made(tmp_path / "steep", [9.75 - 0.5 * k for k in range(16)])
    sentences = summarize_curves([flat, steep])
    assert (
        "train/loss of steep and of flat, smoothed, cross once after 1,050 images; from there to "
        "1,600 images that of steep is below." in sentences
    )
    reached = next(s for s in sentences if "first reached" in s)
    assert "by flat, after 100 images, and by steep after 1,100 images" in reached


def test_noisy_curves_are_compared_smoothed(tmp_path: Path) -> None:
    k = np.arange(200)
    a = made(tmp_path / "a", noisy(5 - 0.02 * k, 0.02))
    b = made(tmp_path / "b", noisy(6 - 0.02 * k, 0.02))
    sentences = summarize_curves([a, b])
    assert any("of a ended below that of b" in s for s in sentences)
    assert any("train/loss of a lies below that of b" in s for s in sentences)


def test_equal_runs_and_runs_of_other_families_are_not_ranked(tmp_path: Path) -> None:
    losses = [5.0 - 0.1 * k for k in range(20)]
    twins = [made(tmp_path / name, losses) for name in ("a", "b")]
    assert summarize_curves(twins) == ["a and b: train/loss is the same at every log."]
    vae = made(tmp_path / "vae", [x / 2 for x in losses], family="vae")
    assert summarize_curves([twins[0], vae]) == []
