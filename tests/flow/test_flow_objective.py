"""The flow objective: its loss, samples, likelihood, visualizations and invalid settings."""

from __future__ import annotations

import math

import pytest
import torch
from small_flow import BOTH, GLOW, SHAPE, batch, flow, loss, objective, train

from dgm.common.errors import UserError
from dgm.flow.objective import FlowConfig
from dgm.preprocessing import DEQUANTIZED
from dgm.rng import Draws

DIMS = math.prod(SHAPE)


def draws_of(count: int, first: int = 0) -> Draws:
    return Draws.of(4, torch.arange(first, first + count))


def test_loss_of_a_rotation_is_that_of_a_normal_density():
    made, net = objective(), flow(GLOW, by=0)
    whole, draws = batch(16)
    found = loss(made, net, (whole, draws))
    x = DEQUANTIZED.dequantize(whole.images, draws, torch.float64)
    nats = 0.5 * (x.square() + math.log(2 * math.pi)).flatten(1).sum(1) + DIMS * math.log(128)
    expected = nats.mean() / (DIMS * math.log(2))
    # Rounding of float32; mirroring changes a square only by its noise within a grey level.
    torch.testing.assert_close(found["loss"].double().detach(), expected, rtol=1e-4, atol=0)
    assert set(found) == {"loss", "log_prob_z_bits_per_dim", "log_det_bits_per_dim"}
    parts = 7 - found["log_prob_z_bits_per_dim"] - found["log_det_bits_per_dim"]
    torch.testing.assert_close(found["loss"], parts)


@pytest.mark.parametrize("name", BOTH)
def test_nats_are_those_of_the_loss(name: str):
    made, net = objective(FlowConfig(flip=False)), flow(BOTH[name])
    whole = batch(8)
    terms = made.nats({"flow": net}, *whole)
    assert set(terms) == {"prior", "log_det", "dequantization"}
    total = torch.stack(list(terms.values())).sum(0)
    bits = total.mean() / (DIMS * math.log(2))
    torch.testing.assert_close(bits, loss(made, net, whole)["loss"].detach(), rtol=1e-5, atol=0)


def test_temperature_spreads_the_samples():
    # A rotation of z: the spread of the pixels is that of z until they are clipped.
    made, net = objective(), {"flow": flow(GLOW, by=0)}
    for temperature in (0.05, 0.2):
        spread = made.sample(net, 64, None, draws_of(64), temperature=temperature).std()
        assert abs(float(spread) / temperature - 1) < 0.05  # 12,288 normals: 0.6 %


def test_interpolation_begins_and_ends_at_stored_images():
    made, net = objective(), {"flow": flow()}
    whole, draws = batch(9)
    sheet = made.visualize(net, whole, draws)["interpolation"]
    assert sheet.shape == (4, 10, 3, 8, 8)
    assert float(sheet.min()) >= -1 and float(sheet.max()) <= 1
    for column, images in ((0, whole.images[:4]), (-1, whole.images[4:8])):
        assert (
            sheet[:, column] - DEQUANTIZED.scale(images)
        ).abs().max() < 0.51 / 128  # noise within a grey level
    assert (sheet[:, 5] - sheet[:, 0]).abs().amax((1, 2, 3)).min() > 2 / 128
    assert made.visualize(net, *batch(1))["interpolation"].shape[0] == 1


def test_temperatures_show_the_same_latents_row_by_row():
    made, net = objective(), {"flow": flow(GLOW, by=0)}
    sheet = made.visualize(net, *batch(4))["temperatures"]
    assert sheet.shape == (6, 10, 3, 8, 8)
    inside = (sheet[5].abs() < 1) & (sheet[0].abs() < 1)
    torch.testing.assert_close(2 * sheet[0][inside], sheet[5][inside], rtol=0, atol=1e-5)
    # They do not depend on the images.
    again = made.visualize(net, *batch(6, epoch=3))["temperatures"]
    assert torch.equal(sheet, again)


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_an_invalid_temperature_of_a_call_is_named(value: float):
    with pytest.raises(UserError, match=rf"sample\.temperature is {value}: choose"):
        objective().sample({"flow": flow()}, 1, None, draws_of(1), temperature=value)


@pytest.mark.parametrize("name", BOTH)
def test_a_small_flow_learns_in_sixty_steps(name: str):
    made, net = objective(), flow(BOTH[name], by=0)
    made.initialize({"flow": net}, *batch(16))
    losses = train(made, net, 60)
    # Images of two colours with noise of a grey level can be coded in well under 2 bits.
    assert sum(losses[-5:]) / 5 < losses[0] - 1
