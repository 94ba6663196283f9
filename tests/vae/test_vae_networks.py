"""The four architectures: sizes of their feature maps, gradients, outputs, bad shapes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from small_vae import (
    ARCHITECTURES,
    SHAPE,
    SMALL,
    TINY,
    architecture,
    batch,
    colours,
    fit,
    loss,
    net,
    objective,
)
from torch import nn

from dgm.common.errors import UserError
from dgm.vae.networks import LOG_SCALE_BOUNDS, LOG_VAR_BOUNDS, VAE, Decoder, Encoder, soft_clamp

architectures = pytest.mark.parametrize("name", ARCHITECTURES)


def sizes_of(side: Encoder | Decoder, given: torch.Tensor) -> list[int]:
    """Return the side lengths of features after every layer, without repetitions."""
    seen: list[int] = []

    def record(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        if output.ndim == 4 and (not seen or seen[-1] != output.shape[-1]):
            seen.append(output.shape[-1])

    hooks = [
        module.register_forward_hook(record)
        for module in side.modules()
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d)
    ]
    side(given)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("shape", ["plain", "encoder_decoder"])
def test_features_shrink_and_grow_as_configured(shape: Any):
    vae = VAE(replace(TINY, encoder=shape, decoder=shape), SHAPE)
    both = [8, 4, 2, 4, 8]
    encoder, decoder = ([8, 4, 2], [2, 4, 8]) if shape == "plain" else (both, both)
    assert sizes_of(vae.encoder, torch.zeros(2, 3, 8, 8)) == encoder
    assert sizes_of(vae.decoder, torch.zeros(2, TINY.latent)) == decoder


@architectures
def test_all_information_passes_the_smallest_features(name: str):
    """With these set to 0 latents do not depend on the image, nor images on the latent."""
    made = net(name)

    def cut(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(output)

    for side in (made.encoder, made.decoder):
        shrinking = [layer for layer in side.path if isinstance(layer, nn.Conv2d)]
        growing = [layer for layer in side.path if isinstance(layer, nn.ConvTranspose2d)]
        (shrinking[-1] if shrinking else growing[0]).register_forward_hook(cut)
    x, z = torch.randn(4, *SHAPE[::-1]).double(), torch.randn(4, TINY.latent).double()
    # Equal inputs up to rounding: convolutions of a batch may differ in the last digit.
    assert made.encoder(x).mu.std(0).max() < 1e-12
    assert made.decoder(z).mean.std(0).max() < 1e-12


@architectures
@pytest.mark.parametrize("pixel_scale", [True, False])
@pytest.mark.parametrize("norm", ["none", "group"])
def test_gradient_reaches_every_parameter(name: str, pixel_scale: bool, norm: Any):
    made = net(name, pixel_scale, norm)
    loss(objective(), made, batch(4))["loss"].backward()
    untouched = [n for n, p in made.named_parameters() if p.grad is None or not p.grad.any()]
    assert untouched == []


@architectures
@pytest.mark.parametrize("pixel_scale", [True, False])
def test_shapes_and_bounds_of_outputs(name: str, pixel_scale: bool):
    made = VAE(architecture(name), (8, 16, 1), pixel_scale)
    with torch.no_grad():  # constant at the start; now far beyond the bounds
        made.decoder.exit.weight.normal_(std=1e4)
        if made.decoder.log_scale is not None:
            made.decoder.log_scale.fill_(1e4)
    posterior, pixels = made(1e4 * torch.randn(3, 1, 8, 16), torch.randn(3, TINY.latent))
    assert posterior.mu.shape == posterior.log_var.shape == (3, TINY.latent)
    assert pixels.mean.shape == pixels.log_scale.shape == (3, 1, 8, 16)
    for value, (low, high) in (
        (posterior.log_var, LOG_VAR_BOUNDS),
        (pixels.log_scale, LOG_SCALE_BOUNDS),
    ):
        assert low <= value.min() and value.max() <= high + 1e-3


def test_initial_decoder_outputs_are_grey_with_a_broad_scale():
    pixels = VAE(TINY, SHAPE).decoder(torch.randn(2, TINY.latent))
    assert not pixels.mean.any()
    # The soft bounds pull by softplus(-3) at most.
    torch.testing.assert_close(pixels.log_scale, torch.full((2, 3, 8, 8), -1.0), rtol=0, atol=0.06)


def test_a_scale_for_each_channel_is_the_same_for_all_pixels_and_latents():
    made = net(pixel_scale=False)
    assert made.decoder.log_scale is not None
    log_scale = made.decoder(torch.randn(3, TINY.latent).double()).log_scale
    assert torch.equal(log_scale, log_scale[:1, :, :1, :1].expand_as(log_scale))
    assert len(log_scale.unique()) == SHAPE[2]


def test_soft_clamp_is_the_identity_between_and_flat_beyond():
    x = torch.linspace(-50, 50, 401).double().requires_grad_()
    y = soft_clamp(x, -12, 6)
    between = (x > -7) & (x < 1)
    # softplus adds log(1 + e^-5) where x is 5 from a bound.
    torch.testing.assert_close(y[between], x[between], rtol=0, atol=0.0068)
    assert (y.diff() >= 0).all() and y.min() >= -12 and y.max() < 6.0001
    y.sum().backward()
    assert x.grad is not None and (x.grad >= 0).all() and x.grad.max() <= 1


@architectures
def test_channels_last_and_autocast_give_nearly_the_same(name: str):
    made = net(name).float()
    x, noise = torch.randn(4, 3, 8, 8), torch.randn(4, TINY.latent)
    before = made(x, noise)
    made = made.to(memory_format=torch.channels_last)
    last = made(x.to(memory_format=torch.channels_last), noise)
    with torch.autocast("cpu", torch.bfloat16):
        cast = made(x, noise)
    for kind in range(2):
        for k in range(2):
            torch.testing.assert_close(last[kind][k], before[kind][k], rtol=1e-3, atol=1e-4)
            # Last layers are not rounded to bfloat16, whose numbers lie 2^-8 apart near 1.
            assert cast[kind][k].dtype == torch.float32
            assert (cast[kind][k] - before[kind][k]).abs().mean() < 0.05


@pytest.mark.slow
@architectures
@pytest.mark.parametrize(
    "likelihood, norm, pixel_scale",
    [("discretized_logistic", "none", True), ("gaussian", "group", False)],
)
def test_each_architecture_learns(name: str, likelihood: Any, norm: Any, pixel_scale: bool):
    made = objective(replace(SMALL, likelihood=likelihood, flip=False), dtype=torch.float32)
    vae = VAE(replace(architecture(name), norm=norm), SHAPE, pixel_scale)
    bits = fit(made, vae, colours(4).repeat(4, 1, 1, 1), steps=60, lr=1e-2)
    # Learning the brightness and spread of colours saves a bit; 2.5 to 3.6 were saved.
    assert sum(bits[-5:]) / 5 < bits[0] - 1.5


def test_height_and_width_are_both_checked():
    with pytest.raises(UserError, match="size 8 x 6 is not divisible by 4"):
        VAE(TINY, (8, 6, 3))
