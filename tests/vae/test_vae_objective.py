"""The VAE's objective: its loss and what it logs, and invalid settings."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_vae import SHAPE, SMALL, batch, colours, fit, loss, net, objective, part_of
from torch import Tensor, nn

from dgm.common.errors import UserError
from dgm.preprocessing import STANDARD
from dgm.vae.networks import VAE, VAENetConfig
from dgm.vae.objective import VAEConfig, VAEObjective, VAESampleConfig

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
    assert float(paid.detach()) > float(plain["kl"].detach()) + 0.1  # so free bits are felt
    expected = (plain["reconstruction_nll"] + 0.75 * paid) / (D * math.log(2))
    torch.testing.assert_close(other["loss"], expected, rtol=1e-12, atol=0)


def test_kl_costs_nothing_when_warm_up_begins():
    found = loss(objective(VAEConfig(kl_warmup_images=1000)), net(), batch(4))
    assert float(found["beta"]) == 0
    bits = found["reconstruction_nll"] / (D * math.log(2))
    torch.testing.assert_close(found["loss"], bits, rtol=1e-12, atol=0)


class Fixed(nn.Module):
    """Stand in for the net's wrapper: only its forward can be called."""

    def __init__(self, vae: VAE):
        super().__init__()
        self.forward = vae.forward


def test_training_goes_through_forward_alone():
    vae, given = net(), batch(4)
    assert torch.equal(
        loss(objective(), Fixed(vae), given)["loss"], loss(objective(), vae, given)["loss"]
    )


@pytest.mark.parametrize("likelihood", ["discretized_logistic", "gaussian"])
@pytest.mark.parametrize("free_bits", [0.0, 1.7])
def test_loss_of_a_batch_is_the_mean_over_its_parts(likelihood: Any, free_bits: float):
    config = replace(SMALL, likelihood=likelihood, free_bits=free_bits, kl_warmup_images=100)
    made, vae = objective(config), net("both")
    whole = batch(8, images_seen=40)
    together = loss(made, vae, whole)
    halves = [loss(made, vae, part_of(whole[0], i, i + 4)) for i in (0, 4)]
    for name, value in together.items():
        mean = torch.stack([half[name] for half in halves]).mean()
        torch.testing.assert_close(value, mean, rtol=1e-12, atol=1e-12)  # rounding of float64


class Seen(nn.Module):
    """Remember the images that a net was given."""

    def __init__(self) -> None:
        super().__init__()
        self.vae = net()
        self.x: Tensor | None = None

    def forward(self, x: Tensor, noise: Tensor) -> Any:
        self.x = x
        return self.vae(x, noise)


@pytest.mark.parametrize("flip", [True, False])
def test_images_are_mirrored_only_with_flip(flip: bool):
    seen = Seen()
    whole, draws = batch(64)
    loss(objective(replace(SMALL, flip=flip)), seen, (whole, draws))
    assert seen.x is not None
    stored = STANDARD.scale(whole.images, torch.float64)
    kept = (seen.x == stored).flatten(1).all(1)
    mirrored = (seen.x == stored.flip(3)).flatten(1).all(1)
    assert (kept ^ mirrored).all()
    # Four standard errors of 64 fair coins.
    assert kept.all() if not flip else 16 < int(kept.sum()) < 48


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
def test_settings_that_make_no_sense_are_named(
    config: dict[str, Any], sample: dict[str, Any], named: str
):
    with pytest.raises(UserError, match=named):
        objective(replace(SMALL, **config), VAESampleConfig(**sample))


@pytest.mark.slow
@pytest.mark.parametrize("likelihood", ["discretized_logistic", "gaussian"])
@pytest.mark.parametrize("scale_kind", ["pixel", "channel"])
def test_a_tiny_net_overfits_one_batch(likelihood: Any, scale_kind: Any):
    config = VAEConfig(likelihood, scale_kind, kl_warmup_images=4800, flip=False)
    made = VAEObjective(config, VAESampleConfig(), 4)
    shape = VAENetConfig(
        latent=4, encoder_channels=16, decoder_channels=16, channel_mult=[1, 2], num_blocks=[1, 1]
    )
    vae = VAE(shape, SHAPE, pixel_scale=scale_kind == "pixel")
    bits = fit(made, vae, colours(8).repeat(4, 1, 1, 1), steps=200, lr=1e-2)
    # Eight images need 3 bits each, next to nothing for a pixel; a net that learns nothing stays
    # near 8 bits, and 3 to 4 were reached.
    assert sum(bits[-10:]) / 10 < 0.6 * bits[0]
