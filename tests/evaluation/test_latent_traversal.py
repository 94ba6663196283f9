"""Latent traversal, and the metrics of a sampler sweep."""

from __future__ import annotations

import pytest
import torch
from small_gan import LATENT, nets, objective

from dgm.evaluation.classifier import Classifier
from dgm.evaluation.distances import FeatureStatistics
from dgm.evaluation.image_similarity import feature_distance
from dgm.evaluation.latent_traversal import (
    decode_on_all,
    most_changing_directions,
    smoothness,
)
from dgm.evaluation.sampler_sweep import SampleQuality, paired_diversity
from dgm.rng import Draws
from dgm.training.engine import Engine


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    torch.manual_seed(0)
    return Classifier(5, width=4).eval()


def pictures(count: int, side: int = 8) -> torch.Tensor:
    return Draws.of(0, torch.arange(count)).uniform("pictures", (3, side, side)) * 2 - 1


def test_feature_distance_grows_with_noise():
    net, images = Classifier(10).eval(), pictures(2, 16)
    noise = torch.randn_like(images)
    distances = torch.stack([
        feature_distance(net, images, (images + size * noise).clamp(-1, 1))
        for size in (0.0, 0.1, 0.3, 0.9)
    ])  # fmt: skip
    assert not distances[0].any() and (distances.diff(dim=0) > 0).all()


def test_smoothness_tells_a_jump_from_even_steps(classifier: Classifier):
    a, b = pictures(2)
    jump = torch.stack([a, a, a, b, b])
    still = a.expand(5, -1, -1, -1)
    even = torch.stack([a, b, a, b, a])  # as far at each step
    found = smoothness(classifier, torch.stack([jump, still, even]))
    assert found[0]["largest_over_mean"] == pytest.approx(4)
    assert found[1] == {"mean_step": 0.0, "largest_over_mean": 1.0}
    assert found[2]["largest_over_mean"] == pytest.approx(1)
    assert found[2]["mean_step"] == pytest.approx(4 * found[0]["mean_step"])


def test_diversity_pairs_images_of_a_class_only(classifier: Classifier):
    a, b, c = pictures(3)
    made, labels = torch.stack([a, b, a, b, c]), torch.tensor([0, 1, 0, 1, 1])
    # Both pairs of a class are of equal images; the fifth image is in no pair.
    assert paired_diversity(classifier, made, labels) == 0
    assert paired_diversity(classifier, made, None) > 0
    assert paired_diversity(classifier, made[:1], None) == 0


def test_quality_of_real_images_is_best(classifier: Classifier):
    samples = pictures(40)
    with torch.no_grad():
        features = classifier.features((samples.clamp(-1, 1) * 127.5).round() / 127.5)
        labels = classifier.out(features).argmax(1)
    statistics = FeatureStatistics.from_features(features)
    quality = SampleQuality(classifier, statistics, class_conditional=True)
    conditional, other = quality(samples, labels), quality(samples, (labels + 1) % 5)
    assert conditional["fd_classifier"] == pytest.approx(0, abs=1e-4)
    assert conditional["class_consistency"] >= 0.9  # rounding may change an undecided one
    assert conditional["class_consistency"] > other["class_consistency"]
    without = SampleQuality(classifier, statistics, class_conditional=False)(samples, labels)
    assert 0.2 <= without["class_certainty"] <= 1 and "class_consistency" not in without


def test_each_latent_is_decoded_for_the_class_of_its_row():
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
    directions, changes = most_changing_directions(Engine("no"), made, own, z, labels, 3, seed=0)
    assert changes == sorted(changes, reverse=True) and changes[-1] > 0
    torch.testing.assert_close(directions @ directions.mT, torch.eye(3, dtype=torch.float64))

    def change(direction: torch.Tensor) -> float:
        with torch.no_grad():
            before, after = (made.decode(own, z + s * direction, None) for s in (-1e-4, 1e-4))
        return float(((after - before) / 2e-4).square().mean().sqrt())

    assert change(directions[0]) == pytest.approx(changes[0], rel=1e-3)
    others = torch.nn.functional.normalize(torch.randn(20, LATENT, dtype=torch.float64), dim=1)
    assert all(change(other) <= changes[0] * 1.001 for other in others)
