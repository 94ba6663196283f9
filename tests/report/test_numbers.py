"""Numbers as people read them, and which way a result is better."""

from __future__ import annotations

import pytest

from dgm.common.formatting import duration, number, percent, short
from dgm.common.metric_registry import higher_is_better


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
