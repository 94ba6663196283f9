"""The diffusion objective: its loss, and invalid settings."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_diffusion import (
    NUM_CLASSES,
    SAMPLE,
    SMALL,
    TINY,
    RecordingNet,
    batch,
    loss,
    objective,
    part_of,
    unet,
)

from dgm.benchmarks.loops import count_conversions
from dgm.common.errors import UserError
from dgm.diffusion.objective import DiffusionObjective
from dgm.diffusion.parameterization import loss_weight, to_prediction
from dgm.diffusion.unet import UNet, UNetConfig
from dgm.objective import Batch
from dgm.rng import Draws
from dgm.training.state_dicts import in_channels_last


@pytest.mark.parametrize("prediction", ["eps", "x_0", "v"])
@pytest.mark.parametrize("weighting", ["simple", "min_snr"])
def test_loss_is_the_weighted_squared_error_of_the_prediction(prediction: Any, weighting: Any):
    config = replace(SMALL, prediction=prediction, weighting=weighting, class_conditional=False)
    made, net = objective(config), RecordingNet()
    whole, draws = batch(16)
    found = loss(made, net, (whole, draws))
    (x_t, t, _) = net.calls[0]
    column = t[:, None, None, None]
    alpha, sigma = made.schedule.alphas[column], made.schedule.sigmas[column]
    eps = draws.normal("noise", (8, 8, 3), torch.float64).permute(0, 3, 1, 2)
    x_0 = (x_t - sigma * eps) / alpha
    # What x_0 is left after that: a stored image, mirrored or not.
    stored = whole.images.permute(0, 3, 1, 2).double() / 127.5 - 1
    off = torch.minimum(
        (x_0 - stored).abs().amax((1, 2, 3)), (x_0 - stored.flip(3)).abs().amax((1, 2, 3))
    )
    assert off.max() < 1e-10
    error = (
        (0.5 * x_t.tanh() - to_prediction(prediction, x_0, eps, alpha, sigma))
        .square()
        .mean((1, 2, 3))
    )
    weight = loss_weight(prediction, weighting, made.schedule.snr[t], config.min_snr_gamma)
    torch.testing.assert_close(found["loss"].detach(), (weight * error).mean(), rtol=1e-9, atol=0)
    assert set(found) == {"loss"}


def test_no_convolution_copies_images_into_another_layout():
    made = objective(dtype=torch.float32)
    config = replace(TINY, channels=16, num_blocks=[2, 1], attention_at=[4])
    net = in_channels_last(UNet(config, 8, num_classes=NUM_CLASSES))
    with torch.profiler.profile(record_shapes=True) as trace:
        loss(made, net, batch(8))["loss"].backward()
    assert any(event.name == "aten::convolution_backward" for event in trace.events())
    assert count_conversions(trace.events()) == 0


def test_loss_starts_at_one_with_a_net_that_predicts_zero():
    net = UNet(TINY, 8, num_classes=NUM_CLASSES).double()
    found = float(loss(objective(), net, batch(64))["loss"].detach())
    # The mean square of 12,288 normals; four standard errors.
    assert abs(found - 1) < 4 * math.sqrt(2 / (64 * 8 * 8 * 3))


@pytest.mark.parametrize("learned_variance", [False, True])
def test_loss_of_a_batch_is_the_mean_over_its_parts(learned_variance: bool):
    config = replace(SMALL, learned_variance=learned_variance)
    made, net = objective(config), unet(config)
    whole = batch(12)
    together = loss(made, net, whole)
    parts = [loss(made, net, part_of(whole[0], i, i + 4)) for i in (0, 4, 8)]
    for name, value in together.items():
        mean = torch.stack([part[name] for part in parts]).mean()
        torch.testing.assert_close(value, mean, rtol=1e-10, atol=0)  # rounding of float64


def test_images_are_mirrored_only_with_flip():
    for flip in (True, False):
        made, net = objective(replace(SMALL, flip=flip)), RecordingNet()
        whole, draws = batch(64)
        loss(made, net, (whole, draws))
        x_t, t, _ = net.calls[0]
        column = t[:, None, None, None]
        eps = draws.normal("noise", (8, 8, 3), torch.float64).permute(0, 3, 1, 2)
        x_0 = (x_t - made.schedule.sigmas[column] * eps) / made.schedule.alphas[column]
        stored = whole.images.permute(0, 3, 1, 2).double() / 127.5 - 1
        kept = (x_0 - stored).abs().amax((1, 2, 3)) < 1e-10
        assert kept.all() if not flip else 16 < int(kept.sum()) < 48  # four standard errors


def test_the_bound_teaches_the_variance_and_not_the_mean():
    config = replace(SMALL, learned_variance=True)
    made, net = objective(config), unet(config)
    found = loss(made, net, batch(8))
    weight = net.exit.weight
    of_all, of_simple, of_bound = (
        torch.autograd.grad(found[name], weight, retain_graph=True)[0]
        for name in ("loss", "loss_simple", "vlb_bits_per_dim")
    )
    assert not of_bound[:3].any() and of_bound[3:].any()
    assert not of_simple[3:].any() and of_simple[:3].any()
    expected = of_simple + config.vlb_weight * of_bound
    torch.testing.assert_close(of_all, expected, rtol=1e-10, atol=1e-16)  # rounding of float64
    total = found["loss_simple"] + config.vlb_weight * found["vlb_bits_per_dim"]
    torch.testing.assert_close(found["loss"], total, rtol=1e-12, atol=0)


def test_the_given_fraction_of_labels_is_dropped_image_by_image():
    made, net = objective(replace(SMALL, label_drop=0.25)), RecordingNet()
    whole, draws = batch(4000)
    loss(made, net, (whole, draws))
    labels_seen = net.calls[0][2]
    assert labels_seen is not None
    dropped = labels_seen == NUM_CLASSES
    assert torch.equal(labels_seen[~dropped], whole.labels[~dropped])
    # Four standard errors of a fraction of 4000; and each class loses some, none all.
    assert abs(float(dropped.double().mean()) - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 4000)
    for label in range(NUM_CLASSES):
        assert 0.1 < float(dropped[whole.labels == label].double().mean()) < 0.4
    loss(made, net, part_of(whole, 100, 103))
    assert torch.equal(net.calls[1][2], labels_seen[100:103])


def test_an_unconditional_net_gets_no_labels():
    made, net = objective(replace(SMALL, class_conditional=False)), RecordingNet()
    loss(made, net, batch(4))
    made.sample({"net": net}, 2, torch.tensor([1, 2]), Draws.of(0, torch.arange(2)))
    assert made.num_classes is None
    assert all(labels is None for *_, labels in net.calls)


@pytest.mark.parametrize(
    "config, sample, named",
    [
        ({"zero_terminal_snr": True}, {}, r"diffusion\.zero_terminal_snr .*choose v or x_0"),
        ({"label_drop": -0.1}, {}, r"diffusion\.label_drop is -0\.1"),
        ({"label_drop": 1.1}, {}, r"diffusion\.label_drop is 1\.1"),
        ({"label_drop": 0.0}, {"guidance": 2.0}, r"sample\.guidance is 2\.0"),
        ({"class_conditional": False}, {"guidance": 2.0}, r"sample\.guidance is 2\.0"),
        ({}, {"variance": "learned"}, r"sample\.variance is 'learned'"),
        ({}, {"steps": 0}, r"sample\.steps is 0: choose 1 to 50"),
        ({}, {"steps": 51}, r"sample\.steps is 51: choose 1 to 50"),
        ({}, {"eta": 1.5}, r"sample\.eta is 1\.5"),
        ({}, {"eta": -0.5}, r"sample\.eta is -0\.5"),
        ({}, {"batch": 0}, r"sample\.batch is 0"),
        ({"num_timesteps": 1}, {"steps": 1}, r"diffusion\.num_timesteps is 1"),
    ],
)
def test_settings_that_clash_are_named_before_training(
    config: dict[str, Any], sample: dict[str, Any], named: str
):
    with pytest.raises(UserError, match=named):
        objective(replace(SMALL, **config), replace(SAMPLE, **sample))


def test_knobs_of_a_call_are_checked_too():
    with pytest.raises(UserError, match=r"sample\.steps is 51"):
        objective().sample({"net": RecordingNet()}, 1, None, Draws.of(0, torch.arange(1)), steps=51)


@pytest.mark.slow
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_a_tiny_net_overfits_eight_images(prediction: Any):
    config = replace(SMALL, prediction=prediction, label_drop=0.0, flip=False)
    made = DiffusionObjective(config, SAMPLE, (8, 8, 3), NUM_CLASSES)
    shape = UNetConfig(
        channels=24, channel_mult=[1, 2], num_blocks=[1, 1], attention_at=[], dropout=0.0
    )
    net = UNet(shape, 8, num_classes=NUM_CLASSES)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    # Flat colours: noise pictures would have to be learned by heart, pixel by pixel.
    images = Draws.of(9, torch.arange(8)).uniform("noise", (1, 1, 3)).mul(256).byte()
    whole = Batch(images.repeat(4, 8, 8, 1), torch.arange(32) % 8 % NUM_CLASSES)
    losses = []
    for step in range(120):
        found = loss(made, net, (whole, Draws.of(0, torch.arange(32), step)))["loss"]
        optimizer.zero_grad()
        found.backward()
        optimizer.step()
        losses.append(float(found.detach()))
    first, last = sum(losses[:5]) / 5, sum(losses[-20:]) / 20
    # A net that learns nothing stays at 1; 0.3 (v) and 0.2 (eps) were reached.
    assert last < 0.5 * first
