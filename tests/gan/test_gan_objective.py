"""The GAN objective: its phases, samples and settings."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from small_gan import ARCHITECTURES, NUM_CLASSES, batch, loss, nets, objective

from dgm.common.errors import UserError
from dgm.gan.networks import GanNetConfig
from dgm.nn.compiling import compile_net
from dgm.rng import Draws

D, G = 0, 1  # the phases


def test_discriminator_learns_first_and_is_not_averaged():
    phases = objective(discriminator_steps=3).phases
    assert [(p.name, p.net, p.every, p.average) for p in phases] == [
        ("discriminator", "discriminator", 1, False),
        ("generator", "generator", 3, True),
    ]


@pytest.mark.parametrize("kind", ["non_saturating", "hinge", "least_squares"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_terms_of_the_loss_are_logged(architecture, kind):
    made = objective(loss=kind, r1=10.0, sees_batch=False)
    own = nets(architecture, batch_norm=False)
    found = {k: float(v.detach()) for k, v in loss(made, own, batch(8), D).items()}
    names = ("loss", "loss_real", "loss_fake", "r1", "logits_real", "logits_fake", "accuracy")
    assert tuple(found) == names
    whole = found["loss_real"] + found["loss_fake"] + 5 * found["r1"]
    assert found["loss"] == pytest.approx(whole) and found["r1"] > 0
    assert 0 <= found["accuracy"] <= 1
    assert tuple(loss(made, own, batch(8), G)) == ("loss", "logits_fake")


def test_r1_is_left_out_where_its_weight_is_zero():
    assert "r1" not in loss(objective(), nets(), batch(4), D)


def test_lazy_r1_is_scaled_by_its_interval():
    made, own = objective(r1=10.0, r1_interval=4, sees_batch=False), nets("residual")
    for step in range(5):
        found = loss(made, own, batch(4, step=step), D)
        assert ("r1" in found) == (step % 4 == 0)
        expected = found["loss_real"] + found["loss_fake"] + 4 * 5 * found.get("r1", 0)
        torch.testing.assert_close(found["loss"], expected)


def test_r1_does_not_change_spectral_norms_or_the_training_mode():
    with_r1, own = objective(r1=10.0, sees_batch=False), nets("residual")
    without, other = objective(sees_batch=False), copy.deepcopy(own)
    loss(with_r1, own, batch(4), D)
    loss(without, other, batch(4), D)
    for net, twin in zip(own.values(), other.values(), strict=True):
        assert all(map(torch.equal, net.buffers(), twin.buffers()))
        assert all(module.training for module in net.modules())


def test_r1_is_refused_where_the_discriminator_has_batch_norm():
    named = r"gan\.r1 is 10.*set model\.discriminator_batch_norm false"
    with pytest.raises(UserError, match=named):
        objective(r1=10.0)
    for config in (GanNetConfig("residual"), GanNetConfig(discriminator_batch_norm=False)):
        assert not config.discriminator_sees_batch
    assert GanNetConfig().discriminator_sees_batch


def test_phases_draw_different_latents():
    made = objective()
    _, draws = batch(4)
    one, other = (made._latent(draws, phase.name) for phase in made.phases)
    assert (one != other).all()


def test_real_images_pass_the_discriminator_together_with_generated_ones():
    made, own = objective(), nets()
    seen: list[int] = []
    own["discriminator"].register_forward_pre_hook(lambda net, args: seen.append(len(args[0])))
    for phase in (D, G):
        loss(made, own, batch(8), phase)
    assert seen == [16, 16]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_generator_step_skips_real_images_where_logits_are_independent(architecture):
    config: dict[str, Any] = {"augment": ["color", "cutout"], "class_conditional": True}
    own = nets(architecture, NUM_CLASSES, batch_norm=False)
    alone, whole = copy.deepcopy(own), copy.deepcopy(own)
    seen: list[int] = []
    alone["discriminator"].register_forward_pre_hook(lambda net, args: seen.append(len(args[0])))
    found = loss(objective(sees_batch=False, **config), alone, batch(8), G)
    expected = loss(objective(sees_batch=True, **config), whole, batch(8), G)
    assert seen == [8]
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12)
    buffers = (nets["discriminator"].buffers() for nets in (alone, whole))
    assert all(map(torch.equal, *buffers))  # one power iteration in each


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_few_steps_learn_to_discriminate(architecture):
    made, own, given = objective(), nets(architecture, width=8), batch(16)

    def learn(phase: int) -> list[dict[str, float]]:
        optimizer = torch.optim.Adam(own[made.phases[phase].net].parameters(), 2e-3)
        found = []
        for _ in range(40):
            values = loss(made, own, given, phase)
            optimizer.zero_grad()
            values["loss"].backward()
            optimizer.step()
            found.append({name: float(value.detach()) for name, value in values.items()})
        return found

    assert learn(D)[-1]["accuracy"] > 0.95
    fooled = learn(G)  # the same discriminator
    assert fooled[-1]["loss"] < 0.5 * fooled[0]["loss"]


def test_temperature_scales_latents():
    made, own = objective(), {name: net.eval() for name, net in nets().items()}
    draws = Draws.of(4, torch.arange(50))
    spread = [
        float(made.sample(own, 50, None, draws, temperature=t).std(0).mean()) for t in (1.0, 0.3)
    ]
    assert spread[1] < 0.5 * spread[0]


def test_interpolation_leads_from_image_to_image():
    made, own = objective(), {name: net.eval() for name, net in nets().items()}
    given, draws = batch(7)
    sheet = made.visualize(own, given, draws)["interpolation"]
    assert sheet.shape == (3, 10, 3, 8, 8)
    latent = made._latent(draws, "picture")
    torch.testing.assert_close(sheet[:, 0], own["generator"](latent[:3]))
    torch.testing.assert_close(sheet[:, -1], own["generator"](latent[3:6]))
    steps = (sheet[:, 1:] - sheet[:, :-1]).abs().flatten(2).mean(2)
    assert (steps > 0).all()


@pytest.mark.slow
def test_compiled_nets_learn_in_turn_as_plain_ones(monkeypatch: pytest.MonkeyPatch):
    """Each net is frozen while the other learns, which compiled code has to notice."""
    given = torch.compile
    monkeypatch.setattr(torch, "compile", lambda call, **_: given(call, backend="aot_eager"))
    made, plain = objective(sees_batch=False), nets("residual")
    compiled = copy.deepcopy(plain)
    for net in compiled.values():
        compile_net(net)
    for _ in range(2):
        for number, phase in enumerate(made.phases):
            found = []
            for own in (plain, compiled):
                for name, net in own.items():
                    net.requires_grad_(name == phase.net)
                loss(made, own, batch(4), number)["loss"].backward()
                found.append([p.grad.clone() for p in own[phase.net].parameters()])
                own[phase.net].zero_grad()
            for expected, gradient in zip(*found, strict=True):
                torch.testing.assert_close(gradient, expected)
