"""Walks through latents: what is measured of them, and that two processes would share the work."""

from __future__ import annotations

import pytest
import torch
from small_gan import LATENT, nets, objective

from dgm.evaluation.classifier import Classifier
from dgm.evaluation.frechet import Moments
from dgm.evaluation.latent_traversal import decode_on_all, most_changing, smoothness
from dgm.evaluation.sampler_sweep import Judge, diversity
from dgm.rng import Draws
from dgm.training.engine import Engine


@pytest.fixture(scope="module")
def judge() -> Classifier:
    torch.manual_seed(0)
    return Classifier(5, width=4).eval()


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    return Draws.of(seed, torch.arange(count)).uniform("pictures", (3, 8, 8)) * 2 - 1


def test_a_leap_is_told_from_an_even_walk(judge: Classifier):
    a, b = pictures(2)
    leap = torch.stack([a, a, a, b, b])
    still = a.expand(5, -1, -1, -1)
    even = torch.stack([a, b, a, b, a])  # as far at each step
    found = smoothness(judge, torch.stack([leap, still, even]))
    assert found[0]["largest_over_mean"] == pytest.approx(4)
    assert found[1] == {"mean_step": 0.0, "largest_over_mean": 1.0}
    assert found[2]["largest_over_mean"] == pytest.approx(1)
    assert found[2]["mean_step"] == pytest.approx(4 * found[0]["mean_step"])


def test_diversity_pairs_images_of_a_class_only(judge: Classifier):
    a, b, c = pictures(3)
    made, labels = torch.stack([a, b, a, b, c]), torch.tensor([0, 1, 0, 1, 1])
    assert diversity(judge, made, labels) == 0  # of each class two alike ones; c is left over
    assert diversity(judge, made, None) > 0
    assert diversity(judge, made[:1], None) == 0


def test_judge_sees_real_images_as_near_and_counts_classes(judge: Classifier):
    made = pictures(40)
    with torch.no_grad():
        features = judge.features((made.clamp(-1, 1) * 127.5).round() / 127.5)
        labels = judge.out(features).argmax(1)
    by_class = Judge(judge, Moments.of(features), by_class=True)(made, labels)
    assert by_class["fd_classifier"] == pytest.approx(0, abs=1e-4)
    assert by_class["class_consistency"] >= 0.9  # rounding may turn one that is undecided
    assert (
        by_class["class_consistency"]
        > Judge(judge, Moments.of(features), True)(made, (labels + 1) % 5)["class_consistency"]
    )
    without = Judge(judge, Moments.of(features), by_class=False)(made, labels)
    assert 0.2 <= without["class_certainty"] <= 1 and "class_consistency" not in without


def test_walks_decode_each_latent_for_the_class_of_its_row():
    made, own = objective(class_conditional=True), nets(classes=3)
    for net in own.values():
        net.eval()
    z = torch.randn(2, 4, LATENT, dtype=torch.float64)
    engine = Engine("no")
    sheet = decode_on_all(engine, made, own, z, torch.tensor([2, 0]), batch=3)
    assert sheet.shape == (2, 4, 3, 8, 8)
    with torch.no_grad():
        expected = made.decode(own, z[1, 2:3], torch.tensor([0]))[0].float()
    torch.testing.assert_close(sheet[1, 2], expected)


def test_images_change_most_along_the_first_direction():
    made, own = objective(), nets()
    for net in own.values():
        net.eval()
    z, labels = torch.randn(3, LATENT, dtype=torch.float64), torch.zeros(3, dtype=torch.int64)
    directions, changes = most_changing(Engine("no"), made, own, z, labels, 3, seed=0)
    assert changes == sorted(changes, reverse=True) and changes[-1] > 0
    torch.testing.assert_close(directions @ directions.mT, torch.eye(3, dtype=torch.float64))

    def change(direction: torch.Tensor) -> float:
        with torch.no_grad():
            here, there = (made.decode(own, z + s * direction, None) for s in (-1e-4, 1e-4))
        return float(((there - here) / 2e-4).square().mean().sqrt())

    assert change(directions[0]) == pytest.approx(changes[0], rel=1e-3)
    others = torch.nn.functional.normalize(torch.randn(20, LATENT, dtype=torch.float64), dim=1)
    assert all(change(other) <= changes[0] * 1.001 for other in others)
