"""Figures of runs side by side, as they are shown on the screen."""

from __future__ import annotations

from dgm.common.metric_registry import find_metric, higher_is_better
from dgm.report.evaluation_table import shown, table
from dgm.report.read_run import flatten_figures

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
    labels = {
        "fid": "FID", "fd_cifar": "FD-cifar", "fd_inception-0a1b2c3d": "FD-inception-0a1b2c3d",
        "precision_inception": "precision-inception", "coverage_by_class": "coverage by class",
    }  # fmt: skip
    assert {name: find_metric(name).label for name in labels} == labels
    assert "no FID" in find_metric("fd_cifar").protocol
    assert "Inception" in find_metric("fid").protocol and find_metric("steps").protocol == ""


def test_spread_stands_beside_the_mean():
    assert shown("fd_cifar", FIRST["distances_cifar"]) == "12.5 ± 0.51"
    assert shown("score_cifar", FIRST["distances_cifar"]) == "3.5"


def test_runs_stand_side_by_side():
    lines = list(table({"first": FIRST, "a-run-with-a-long-name": SECOND}))
    assert lines[0].split() == ["first", "a-run-with-a-long-name"]
    assert lines[1].split() == ["images", "seen", "9,600", "100"]
    assert "  features cifar" in lines  # the same for both, said once
    (counts,) = (line for line in lines if "num generated" in line)
    assert counts.split()[-2:] == ["500", "20"]
    (far,) = (line for line in lines if "FD-cifar" in line)
    assert far.split()[1:5] == ["12.5", "±", "0.51", "7"]
    (ring,) = (line for line in lines if "ring" in line)
    assert ring.split() == ["ring", "75.0", "%", "–"]
    text = "\n".join(lines)
    assert "0123abcd" not in text and "by seed" not in text and "12.0" not in text


def test_the_better_of_two_is_known():
    better = {name: higher_is_better(f"measure/{name}") for name in (
        "fid", "kid", "fd_cifar", "kd_cifar", "inception_score", "score_cifar", "precision_cifar",
        "recall_inception", "coverage_cifar", "eps_mse", "loss", "loss_error",
        "nearer_than_test_in_pixels", "diversity", "distance_of_test_in_pixels",
    )}  # fmt: skip
    lower = {name for name, higher in better.items() if higher is False}
    assert lower == {"fid", "kid", "fd_cifar", "kd_cifar", "eps_mse", "loss"}
    neither = {name for name, higher in better.items() if higher is None}
    assert neither == {
        "loss_error", "nearer_than_test_in_pixels", "diversity", "distance_of_test_in_pixels"
    }  # fmt: skip


def test_columns_are_figures_not_their_spread_nor_classes():
    names = [name for name, _ in flatten_figures(FIRST)]
    assert names == [
        "images_seen", "distances_cifar/num_generated", "distances_cifar/fd_cifar",
        "distances_cifar/score_cifar", "class_consistency/class_consistency",
    ]  # fmt: skip
