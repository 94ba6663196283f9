"""Names and formatting of metrics, and the table of runs on the screen."""

from __future__ import annotations

from dgm.common.formatting import duration, number, percent
from dgm.common.metric_registry import higher_is_better
from dgm.report.evaluation_table import format_with_spread, table
from dgm.report.read_run import flatten_metrics

FIRST = {
    "images_seen": 9600,
    "checkpoint": "0123abcd",
    "distances_classifier": {
        "features": "classifier",
        "num_generated": 500,
        "fd_classifier": 12.5,
        "score_classifier": 3.5,
        "spread_over_seeds": {"fd_classifier": 0.512},
        "by_seed": [{"fd_classifier": 12.0}],
    },
    "class_consistency": {
        "class_consistency": 0.5,
        "class_consistency_by_class": {"circle": 0.25, "ring": 0.75},
    },
}
SECOND = {
    "images_seen": 100,
    "distances_classifier": {"features": "classifier", "num_generated": 20, "fd_classifier": 7},
}


def test_spread_stands_beside_the_mean():
    assert format_with_spread("fd_classifier", FIRST["distances_classifier"]) == "12.5 ± 0.51"
    assert format_with_spread("score_classifier", FIRST["distances_classifier"]) == "3.5"


def test_runs_stand_side_by_side():
    lines = list(table({"first": FIRST, "a-run-with-a-long-name": SECOND}))
    assert lines[0].split() == ["first", "a-run-with-a-long-name"]
    assert lines[1].split() == ["images", "seen", "9,600", "100"]
    assert "  features classifier" in lines  # the same for both, shown once
    (counts,) = (line for line in lines if "num generated" in line)
    assert counts.split()[-2:] == ["500", "20"]
    (far,) = (line for line in lines if "FD-classifier" in line)
    assert far.split()[1:5] == ["12.5", "±", "0.51", "7"]
    (ring,) = (line for line in lines if "ring" in line)
    assert ring.split() == ["ring", "75.0", "%", "–"]
    text = "\n".join(lines)
    assert "0123abcd" not in text and "by seed" not in text and "12.0" not in text


def test_spreads_and_classes_are_not_flattened():
    names = [name for name, _ in flatten_metrics(FIRST)]
    assert names == [
        "images_seen", "distances_classifier/num_generated", "distances_classifier/fd_classifier",
        "distances_classifier/score_classifier", "class_consistency/class_consistency",
    ]  # fmt: skip


def test_numbers_for_people() -> None:
    assert [number(v) for v in (1234567, 0.0312345, 1e-5, 0.0)] == [
        "1,234,567",
        "0.03123",
        "1e-5",
        "0",
    ]
    assert [percent(v) for v in (1.0, 0.978, 0.0312)] == ["100.0 %", "97.8 %", "3.12 %"]
    assert [duration(v) for v in (3.2, 252, 7500, 100 * 3600 * 24)] == [
        "3.2 s", "4 min 12 s", "2 h 05 min", "100 d 0 h",
    ]  # fmt: skip


BETTER: dict[bool | None, str] = {
    True: "class_consistency train/elbo measure/inception_score measure/score_classifier "
    "measure/precision_classifier measure/recall_inception measure/coverage_classifier",
    False: "train/generator/loss eval/fd_classifier eval/bits_per_dim_bound bits_per_dim/exact "
    "train/reconstruction_nll measure/fid measure/kid measure/fd_classifier measure/kd_classifier "
    "measure/eps_mse",
    None: "train/kl train/discriminator/accuracy classifier_accuracy_on_real_test_images "
    "bits_per_dim/error reconstruction/active_latents num_generated measure/loss_error "
    "measure/nearer_than_test_in_pixels measure/diversity measure/distance_of_test_in_pixels",
}


def test_which_direction_is_better() -> None:
    for better, keys in BETTER.items():
        assert {key: higher_is_better(key) for key in keys.split()} == dict.fromkeys(
            keys.split(), better
        )
