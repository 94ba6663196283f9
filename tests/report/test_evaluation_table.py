"""Names and formatting of metrics, and the table of runs on the screen."""

from __future__ import annotations

import pytest

from dgm.common.formatting import duration, number, percent, short
from dgm.metrics import higher_is_better
from dgm.report.evaluation_table import format_with_spread, label, note, table
from dgm.report.read_run import flatten_metrics

FIRST = {
    "images_seen": 9600,
    "checkpoint": "0123abcd",
    "distances_cifar": {
        "features": "cifar",
        "num_generated": 500,
        "fd_cifar": 12.5,
        "score_cifar": 3.5,
        "spread_over_seeds": {"fd_cifar": 0.512},
        "by_seed": [{"fd_cifar": 12.0}],
    },
    "class_consistency": {
        "class_consistency": 0.5,
        "class_consistency_by_class": {"circle": 0.25, "ring": 0.75},
    },
}
SECOND = {
    "images_seen": 100,
    "distances_cifar": {"features": "cifar", "num_generated": 20, "fd_cifar": 7},
}


def test_only_inceptions_distance_is_called_fid():
    assert label("fid") == "FID" and label("fd_cifar") == "FD-cifar"
    assert label("fd_inception-0a1b2c3d") == "FD-inception-0a1b2c3d"
    assert label("precision_inception") == "precision-inception"
    assert label("coverage_by_class") == "coverage by class"
    assert "no FID" in note("fd_cifar") and "Inception" in note("fid") and note("steps") == ""


def test_spread_stands_beside_the_mean():
    assert format_with_spread("fd_cifar", FIRST["distances_cifar"]) == "12.5 ± 0.51"
    assert format_with_spread("score_cifar", FIRST["distances_cifar"]) == "3.5"


def test_runs_stand_side_by_side():
    lines = list(table({"first": FIRST, "a-run-with-a-long-name": SECOND}))
    assert lines[0].split() == ["first", "a-run-with-a-long-name"]
    assert lines[1].split() == ["images", "seen", "9,600", "100"]
    assert "  features cifar" in lines  # the same for both, shown once
    (counts,) = (line for line in lines if "num generated" in line)
    assert counts.split()[-2:] == ["500", "20"]
    (far,) = (line for line in lines if "FD-cifar" in line)
    assert far.split()[1:5] == ["12.5", "±", "0.51", "7"]
    (ring,) = (line for line in lines if "ring" in line)
    assert ring.split() == ["ring", "75.0", "%", "–"]
    text = "\n".join(lines)
    assert "0123abcd" not in text and "by seed" not in text and "12.0" not in text


def test_spreads_and_classes_are_not_flattened():
    names = [name for name, _ in flatten_metrics(FIRST)]
    assert names == [
        "images_seen", "distances_cifar/num_generated", "distances_cifar/fd_cifar",
        "distances_cifar/score_cifar", "class_consistency/class_consistency",
    ]  # fmt: skip


def test_numbers_for_people() -> None:
    assert [number(v) for v in (1234567, 0.0312345, 1e-5, 0.0)] == [
        "1,234,567",
        "0.03123",
        "1e-5",
        "0",
    ]
    assert [percent(v) for v in (1.0, 0.978, 0.0312)] == ["100.0 %", "97.8 %", "3.12 %"]
    assert [short(v) for v in (1.5e6, 20_000, 0, 1.04e-4)] == ["1.5M", "20k", "0", "1.04e-4"]
    assert [duration(v) for v in (3.2, 252, 7500, 100 * 3600 * 24)] == [
        "3.2 s", "4 min 12 s", "2 h 05 min", "100 d 0 h",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("key", "higher"),
    [
        ("train/generator/loss", False),
        ("measure/fid", False),
        ("measure/kid", False),
        ("measure/fd_cifar", False),
        ("measure/kd_cifar", False),
        ("measure/inception_score", True),
        ("measure/score_cifar", True),
        ("measure/precision_cifar", True),
        ("measure/recall_inception", True),
        ("measure/coverage_cifar", True),
        ("measure/eps_mse", False),
        ("measure/loss_error", None),
        ("measure/nearer_than_test_in_pixels", None),
        ("measure/diversity", None),
        ("measure/distance_of_test_in_pixels", None),
        ("eval/fd_classifier", False),
        ("eval/bits_per_dim_bound", False),
        ("bits_per_dim/exact", False),
        ("class_consistency", True),
        ("train/reconstruction_nll", False),
        ("train/elbo", True),
        ("train/kl", None),
        ("train/discriminator/accuracy", None),
        ("classifier_accuracy_on_real_test_images", None),
        ("bits_per_dim/error", None),
        ("reconstruction/active_latents", None),
        ("num_generated", None),
    ],
)
def test_which_way_a_result_is_better(key: str, higher: bool | None) -> None:
    assert higher_is_better(key) is higher
