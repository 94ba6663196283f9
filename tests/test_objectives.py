"""Objectives of all families and their variants: means over images, flips, samples, likelihoods.

tests/test_contract.py tests each family as configured by `launch/configs/*_tiny.yaml`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import small_diffusion
import small_flow
import small_gan
import small_vae
import torch
from torch import Tensor, nn

from dgm.objective import Batch, Likelihood, Objective
from dgm.preprocessing import draw_flips, flip_images
from dgm.rng import Draws

Made = tuple[Objective, dict[str, nn.Module]]


def diffusion(flip: bool, sample: dict[str, Any], **changes: Any) -> Made:
    config = replace(small_diffusion.SMALL, flip=flip, **changes)
    settings = replace(small_diffusion.SAMPLE, guidance=2.0, **sample)
    return small_diffusion.objective(config, settings), {"net": small_diffusion.unet(config)}


def gan(flip: bool, architecture: str, **changes: Any) -> Made:
    classes = small_gan.NUM_CLASSES if changes.get("class_conditional") else None
    return small_gan.objective(flip=flip, **changes), small_gan.nets(architecture, classes)


def vae(flip: bool, architecture: str, add_noise: bool, **changes: Any) -> Made:
    config = replace(small_vae.SMALL, flip=flip, **changes)
    sample = small_vae.VAESampleConfig(add_noise=add_noise)
    return small_vae.objective(config, sample), {"vae": small_vae.net(architecture)}


def flow(flip: bool, name: str) -> Made:
    config = small_flow.FlowConfig(flip=flip)
    net = small_flow.flow(small_flow.BOTH[name], dtype=torch.float64)
    return small_flow.objective(config, dtype=torch.float64), {"flow": net}


BY_IMAGE: dict[str, Callable[[bool], Made]] = {
    "diffusion, ddim": lambda flip: diffusion(flip, {"sampler": "ddim", "eta": 0.7}),
    "diffusion, dpmpp_2m": lambda flip: diffusion(flip, {"sampler": "dpmpp_2m"}),
    "diffusion, heun": lambda flip: diffusion(flip, {"sampler": "heun"}),
    "diffusion, learned variance": lambda flip: diffusion(
        flip, {"sampler": "ddpm", "variance": "learned"}, learned_variance=True
    ),
    "vae": lambda flip: vae(flip, "plain", False),
    "vae, free bits": lambda flip: vae(flip, "both", True, free_bits=1.7, kl_warmup_images=100),
    "vae, Gaussian": lambda flip: vae(flip, "plain", True, likelihood="gaussian"),
    "glow": lambda flip: flow(flip, "glow"),
    "realnvp": lambda flip: flow(flip, "realnvp"),
}
"""Families whose loss of an image does not depend on its batch."""

ALL = {
    **BY_IMAGE,
    "dcgan": lambda flip: gan(flip, "dcgan"),
    "dcgan, by class": lambda flip: gan(flip, "dcgan", class_conditional=True),
    "residual gan": lambda flip: gan(flip, "residual"),
    "residual gan, by class": lambda flip: gan(flip, "residual", class_conditional=True),
}
every = pytest.mark.parametrize("make", ALL.values(), ids=ALL)
by_image = pytest.mark.parametrize("make", BY_IMAGE.values(), ids=BY_IMAGE)


def given(first: int, last: int) -> tuple[Batch, Draws]:
    index = torch.arange(first, last)
    images = Draws.of(9, index).uniform("noise", (8, 8, 3)).mul(256).byte()
    return Batch(images, index % 3, images_seen=40), Draws.of(0, index)


def losses(made: Made, batch: Batch, draws: Draws) -> dict[str, Tensor]:
    """Return the values of all phases."""
    objective, nets = made
    return {
        f"{phase.name}/{name}": value.detach()
        for phase in objective.phases
        for name, value in objective.loss(nets, batch, phase, draws).items()
    }


@by_image
def test_loss_of_a_batch_is_the_mean_over_its_parts(make: Callable[[bool], Made]):
    made = make(True)
    parts = [losses(made, *given(i, i + 4)) for i in (0, 4, 8)]
    for name, value in losses(made, *given(0, 12)).items():
        mean = torch.stack([part[name] for part in parts]).mean()
        torch.testing.assert_close(value, mean, rtol=1e-10, atol=1e-12)  # rounding of float64


@every
def test_images_are_mirrored_only_with_flip(make: Callable[[bool], Made]):
    (objective, nets), (plain, _) = make(True), make(False)
    batch, draws = given(0, 8)
    mirrored = replace(batch, images=flip_images(batch.images, draw_flips(draws)))
    assert not torch.equal(mirrored.images, batch.images)
    expected = losses((plain, copy.deepcopy(nets)), mirrored, draws)
    for name, value in losses((objective, nets), batch, draws).items():
        assert torch.equal(value, expected[name]), name


@every
def test_gradient_reaches_every_parameter_of_the_phases_net_and_no_other(
    make: Callable[[bool], Made],
):
    objective, nets = make(True)
    batch, draws = given(0, 8)
    for phase in objective.phases:
        for name, net in nets.items():  # as the engine does
            net.zero_grad()
            net.requires_grad_(name == phase.net)
        objective.loss(nets, batch, phase, draws)["loss"].backward()
        for name, net in nets.items():
            for key, parameter in net.named_parameters():
                reached = parameter.grad is not None and bool(parameter.grad.any())
                assert reached == (name == phase.net), f"{name}.{key}"


@every
def test_samples_depend_on_their_draws_and_not_on_the_batch(make: Callable[[bool], Made]):
    objective, nets = make(True)
    for net in nets.values():
        net.eval()
    labels, index = torch.arange(7) % 3, torch.arange(7)
    whole = objective.sample(nets, 7, labels, Draws.of(4, index))
    assert whole.shape == (7, 3, 8, 8) and whole.isfinite().all() and whole.abs().max() <= 1
    assert not torch.allclose(whole[0], whole[1])
    close = {"rtol": 0.0, "atol": 1e-9}  # rounding of float64 over several steps
    for size in (1, 3):
        parts = objective.sample(nets, 7, labels, Draws.of(4, index), batch=size)
        torch.testing.assert_close(parts, whole, **close)
    # As a second process does: some of the images only.
    part = objective.sample(nets, 2, labels[4:6], Draws.of(4, index[4:6]))
    torch.testing.assert_close(part, whole[4:6], **close)
    assert not torch.allclose(objective.sample(nets, 7, labels, Draws.of(5, index)), whole)


@by_image
def test_nats_are_terms_of_each_image(make: Callable[[bool], Made]):
    objective, nets = make(True)
    assert isinstance(objective, Likelihood) and objective.exact == ("flow" in nets)
    own = objective.nats(nets, *given(2, 4))
    for name, value in objective.nats(nets, *given(0, 6)).items():
        assert value.shape == (6,) and value.isfinite().all() and not value.requires_grad
        torch.testing.assert_close(value[2:4], own[name], rtol=1e-9, atol=1e-9)  # rounding
