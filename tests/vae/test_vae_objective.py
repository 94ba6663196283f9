"""The VAE's objective: its loss and what it logs, and invalid settings."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_vae import SHAPE, SMALL, batch, loss, net, objective
from torch import nn

from dgm.common.errors import UserError
from dgm.preprocessing import STANDARD
from dgm.vae.objective import VAESampleConfig

D = math.prod(SHAPE)
NAMES = {"loss", "reconstruction_nll", "kl", "elbo", "bits_per_dim_bound", "beta"}


@pytest.mark.parametrize("likelihood", ["discretized_logistic", "gaussian"])
def test_loss_is_the_bound_in_bits_per_dimension(likelihood: Any):
    made, vae = objective(replace(SMALL, likelihood=likelihood, flip=False)), net()
    whole, draws = batch(8)
    found = loss(made, vae, (whole, draws))
    nats = made.nats({"vae": vae}, whole, draws)
    assert set(found) == NAMES
    assert all(value.shape == () for value in found.values())
    kl, nll = nats["kl"].mean(), nats["reconstruction_nll"].mean()
    close = {"rtol": 1e-12, "atol": 0.0}  # rounding of float64
    torch.testing.assert_close(found["kl"].detach(), kl, **close)
    torch.testing.assert_close(found["reconstruction_nll"].detach(), nll, **close)
    torch.testing.assert_close(found["elbo"].detach(), -(nll + kl), **close)
    bits = (nll + kl) / (D * math.log(2))
    torch.testing.assert_close(found["loss"].detach(), bits, **close)
    torch.testing.assert_close(found["bits_per_dim_bound"].detach(), bits, **close)


def test_beta_warm_up_and_free_bits_change_the_loss_and_not_the_bound():
    vae = net()
    whole, draws = batch(8, images_seen=300)
    plain = loss(objective(), vae, (whole, draws))
    config = replace(SMALL, beta=3.0, kl_warmup_images=1200, free_bits=1.7)
    other = loss(objective(config), vae, (whole, draws))
    assert float(other["beta"]) == 0.75 and float(plain["beta"]) == 1
    for name in NAMES - {"loss", "beta"}:
        assert torch.equal(plain[name], other[name])
    images = torch.where(
        draws.bits("flip", 1)[0][:, :1, None, None] >= 2**31, whole.images.flip(2), whole.images
    )
    paid = vae.encoder(STANDARD.scale(images, torch.float64)).kl().clamp(min=1.7).sum(1).mean()
    assert float(paid.detach()) > float(plain["kl"].detach()) + 0.1  # so free bits take effect
    expected = (plain["reconstruction_nll"] + 0.75 * paid) / (D * math.log(2))
    torch.testing.assert_close(other["loss"], expected, rtol=1e-12, atol=0)


def test_training_calls_forward_only():
    vae, given = net(), batch(4)
    wrapper = nn.Module()  # as DDP's: its attributes are not those of the net
    wrapper.forward = vae.forward
    found, expected = (loss(objective(), each, given)["loss"] for each in (wrapper, vae))
    assert torch.equal(found, expected)


def test_float32_loss_is_close_to_float64s():
    vae = net()
    given = batch(8)
    exact = loss(objective(), vae, given)
    single = loss(objective(dtype=torch.float32), vae.float(), given)
    for name, value in exact.items():
        # Rounding of float32 over two nets and a sum of 192 pixels.
        tolerance = 1e-3 * (1 + abs(float(value.detach())))
        assert single[name].dtype == torch.float32
        assert float(single[name].detach()) == pytest.approx(float(value.detach()), abs=tolerance)


@pytest.mark.parametrize(
    "config, sample, named",
    [
        ({"beta": -0.1}, {}, r"vae\.beta is -0\.1: choose 0 or more"),
        ({"beta": math.inf}, {}, r"vae\.beta is inf"),
        ({"free_bits": -1.0}, {}, r"vae\.free_bits is -1\.0"),
        ({"kl_warmup_images": -1}, {}, r"vae\.kl_warmup_images is -1"),
        ({}, {"temperature": 0.0}, r"sample\.temperature is 0\.0: choose a number above 0"),
        ({}, {"temperature": -1.0}, r"sample\.temperature is -1\.0"),
        ({}, {"temperature": math.nan}, r"sample\.temperature is nan"),
        ({}, {"batch": 0}, r"sample\.batch is 0"),
    ],
)
def test_invalid_settings_are_named(config: dict[str, Any], sample: dict[str, Any], named: str):
    with pytest.raises(UserError, match=named):
        objective(replace(SMALL, **config), VAESampleConfig(**sample))
