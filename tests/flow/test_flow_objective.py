"""The flow objective: its loss, samples, likelihood, visualizations and invalid settings."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from small_flow import BOTH, GLOW, REALNVP, SHAPE, batch, flow, loss, objective, part_of, train

from dgm.common.errors import UserError
from dgm.flow.objective import FlowConfig, FlowSampleConfig
from dgm.images import to_uint8
from dgm.objective import InitializedByData, Likelihood, NonFiniteFinder, Visualizable
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
    # rounding of float32; mirroring changes no square but of the noise of 1/128.
    torch.testing.assert_close(found["loss"].double().detach(), expected, rtol=1e-4, atol=0)
    assert set(found) == {"loss", "log_prob_z_bits_per_dim", "log_det_bits_per_dim"}
    parts = 7 - found["log_prob_z_bits_per_dim"] - found["log_det_bits_per_dim"]
    torch.testing.assert_close(found["loss"], parts)


@pytest.mark.parametrize("name", BOTH)
def test_loss_of_a_batch_is_the_mean_over_its_halves(name: str):
    made, net = objective(dtype=torch.float64), flow(BOTH[name], dtype=torch.float64)
    whole = batch(8)
    together = loss(made, net, whole)
    halves = [loss(made, net, part_of(whole, i, i + 4)) for i in (0, 4)]
    for key, value in together.items():
        mean = (halves[0][key] + halves[1][key]) / 2
        torch.testing.assert_close(value, mean, rtol=1e-12, atol=0)  # rounding of float64


@pytest.mark.parametrize("name", BOTH)
def test_gradient_reaches_every_parameter(name: str):
    net = flow(BOTH[name])
    loss(objective(), net, batch(8))["loss"].backward()
    untouched = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert untouched == []


def test_images_are_mirrored_only_with_flip():
    seen = []
    net = flow()
    net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    whole, draws = batch(64)
    stored = DEQUANTIZED.dequantize(whole.images, draws)
    for flip in (True, False):
        loss(objective(FlowConfig(flip=flip)), net, (whole, draws))
        kept = (seen[-1] - stored).abs().amax((1, 2, 3)) < 1 / 100  # a grey level is 1/128
        assert kept.all() if not flip else 16 < int(kept.sum()) < 48  # four standard errors


@pytest.mark.parametrize("name", BOTH)
def test_nats_are_those_of_the_loss_and_exact(name: str):
    made, net = objective(FlowConfig(flip=False)), flow(BOTH[name])
    whole = batch(8)
    terms = made.nats({"flow": net}, *whole)
    assert set(terms) == {"prior", "log_det", "dequantization"}
    assert all(term.shape == (8,) and not term.requires_grad for term in terms.values())
    total = torch.stack(list(terms.values())).sum(0)
    bits = total.mean() / (DIMS * math.log(2))
    torch.testing.assert_close(bits, loss(made, net, whole)["loss"].detach(), rtol=1e-5, atol=0)
    assert made.exact
    # An image's own terms are of no other image.
    alone = made.nats({"flow": net}, *part_of(whole, 5, 6))
    for key, term in terms.items():
        torch.testing.assert_close(term[5:6], alone[key], rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("name", BOTH)
def test_sample_i_follows_from_the_draws_of_index_i(name: str):
    made, net = objective(), {"flow": flow(BOTH[name])}
    together = made.sample(net, 7, None, draws_of(7))
    assert together.shape == (7, 3, 8, 8) and together.dtype == torch.float32
    assert float(together.min()) >= -1 and float(together.max()) <= 1
    assert not torch.equal(together[0], together[1])
    for other in (
        made.sample(net, 7, torch.zeros(7, dtype=torch.int64), draws_of(7), batch=2),
        torch.cat([made.sample(net, 1, None, draws_of(1, i)) for i in range(7)]),
    ):
        # Products of another size round otherwise.
        torch.testing.assert_close(other, together, rtol=0, atol=1e-4)


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
    assert made.visualize(net, *part_of((whole, draws), 0, 1))["interpolation"].shape[0] == 1


def test_temperatures_show_the_same_latents_row_by_row():
    made, net = objective(), {"flow": flow(GLOW, by=0)}
    sheet = made.visualize(net, *batch(4))["temperatures"]
    assert sheet.shape == (6, 10, 3, 8, 8)
    inside = (sheet[5].abs() < 1) & (sheet[0].abs() < 1)
    torch.testing.assert_close(2 * sheet[0][inside], sheet[5][inside], rtol=0, atol=1e-5)
    # Whatever images the sheet is drawn beside.
    again = made.visualize(net, *batch(6, epoch=3))["temperatures"]
    assert torch.equal(sheet, again)


def test_visualizations_and_samples_can_be_turned_into_files():
    made, net = objective(), {"flow": flow(REALNVP)}
    for sheet in made.visualize(net, *batch(4)).values():
        assert to_uint8(sheet.flatten(0, 1), DEQUANTIZED).shape[1:] == (8, 8, 3)


def test_the_objective_implements_the_optional_protocols():
    made = objective()
    for ability in (Likelihood, Visualizable, InitializedByData, NonFiniteFinder):
        assert isinstance(made, ability)
    assert made.num_classes is None and made.phases[0].net == "flow"


@pytest.mark.parametrize(
    "name, value",
    [
        ("temperature", 0.0),
        ("temperature", -1.0),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("batch", 0),
    ],
)
def test_knobs_that_make_no_sample_are_named(name: str, value: Any):
    knob = {name: value}
    message = rf"sample\.{name} is {value}: choose"
    with pytest.raises(UserError, match=message):
        objective(sample=FlowSampleConfig(**knob))
    with pytest.raises(UserError, match=message):
        objective().sample({"flow": flow()}, 1, None, draws_of(1), **knob)


@pytest.mark.parametrize("name", BOTH)
def test_sixty_steps_teach_a_small_flow(name: str):
    made, net = objective(), flow(BOTH[name], by=0)
    made.initialize({"flow": net}, *batch(16))
    losses = train(made, net, 60)
    # Images of two colours with noise of a grey level can be coded in well under 2 bits.
    assert sum(losses[-5:]) / 5 < losses[0] - 1
