"""The VAE's objective: its loss and what it logs, samples, visualizations, invalid settings."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_vae import SHAPE, SMALL, TINY, batch, loss, net, objective
from torch import Tensor, nn

from dgm.common.errors import UserError
from dgm.objective import Batch, Visualizable
from dgm.preprocessing import STANDARD
from dgm.rng import Draws
from dgm.vae.networks import VAE
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


LATENTS = (1, 2, 6)


def draws_of(count: int) -> Draws:
    return Draws.of(7, torch.arange(count))


def test_samples_are_decoded_draws_of_the_prior():
    made, vae = objective(), net()
    z = draws_of(5).normal("latent", (TINY.latent,), torch.float64)
    for temperature in (1.0, 0.3):
        images = made.sample({"vae": vae}, 5, None, draws_of(5), temperature=temperature)
        expected = vae.decoder(temperature * z).mean.clamp(-1, 1)
        assert torch.equal(images, expected)


def test_noise_is_that_of_the_likelihood():
    made, vae = objective(), net()
    with torch.no_grad():
        vae.decoder.exit.bias[3:] = -3.0  # narrow scales
    mean = made.sample({"vae": vae}, 200, None, draws_of(200))
    noisy = made.sample({"vae": vae}, 200, None, draws_of(200), add_noise=True)
    z = draws_of(200).normal("latent", (TINY.latent,), torch.float64)
    inside = mean.abs() < 0.9
    spread = vae.decoder(z).log_scale.detach().exp() * torch.pi / 3**0.5
    found = ((noisy - mean) / spread)[inside].square().mean()
    # A logistic's kurtosis is 4.2: of 30,000 pixels four standard errors are 0.04; rounding to
    # levels adds 1/12 of a level's square, 0.005 here.
    assert abs(float(found) - 1) < 0.05


def test_labels_are_ignored():
    made, nets = objective(), {"vae": net()}
    labeled = made.sample(nets, 3, torch.tensor([0, 1, 2]), draws_of(3))
    assert torch.equal(labeled, made.sample(nets, 3, None, draws_of(3)))
    assert made.num_classes is None


def test_settings_of_a_call_are_checked_and_replace_those_of_the_run():
    made, nets = objective(sample=VAESampleConfig(temperature=0.5)), {"vae": net()}
    with pytest.raises(UserError, match=r"sample\.temperature is 0"):
        made.sample(nets, 1, None, draws_of(1), temperature=0)
    one = made.sample(nets, 1, None, draws_of(1), temperature=1.0)
    expected = objective().sample(nets, 1, None, draws_of(1))
    assert torch.equal(one, expected)
    assert not torch.equal(made.sample(nets, 1, None, draws_of(1)), expected)


def visualized(count: int, latent: int) -> tuple[VAE, Batch, dict[str, Tensor]]:
    vae = VAE(replace(TINY, latent=latent), SHAPE).double()
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    made = objective(latent=latent)
    assert isinstance(made, Visualizable)
    whole, draws = batch(count)
    return vae, whole, made.visualize({"vae": vae}, whole, draws)


@pytest.mark.parametrize("count", [2, 3, 7, 64])
@pytest.mark.parametrize("latent", LATENTS)
def test_visualizations_are_images_in_rows_and_columns(count: int, latent: int):
    _, _, made = visualized(count, latent)
    pairs = min(5, count)
    expected = {
        "reconstructions": (min(8, count // pairs), 2 * pairs),
        "interpolation": (min(8, count // 2), 10),
        "traversal": (min(8, latent), 10),
    }
    assert {name: tuple(sheet.shape[:2]) for name, sheet in made.items()} == expected
    for sheet in made.values():
        assert sheet.shape[2:] == (3, 8, 8)
        assert sheet.isfinite().all() and sheet.abs().max() <= 1 and not sheet.requires_grad


def test_reconstructions_are_beside_their_originals():
    vae, whole, made = visualized(12, 6)
    x = STANDARD.scale(whole.images, torch.float64)
    back = vae.decoder(vae.encoder(x).mu).mean.clamp(-1, 1).detach()
    sheet = made["reconstructions"]
    assert torch.equal(sheet[:, 0::2].flatten(0, 1), x[:10])
    torch.testing.assert_close(sheet[:, 1::2].flatten(0, 1), back[:10], rtol=0, atol=1e-12)


def test_interpolation_leads_from_one_reconstruction_to_the_other():
    vae, whole, made = visualized(6, 6)
    mu = vae.encoder(STANDARD.scale(whole.images, torch.float64)).mu
    sheet = made["interpolation"]
    for row in range(3):
        start, end = mu[2 * row], mu[2 * row + 1]
        for column in (0, 4, 9):
            z = start + column / 9 * (end - start)
            expected = vae.decoder(z[None]).mean.clamp(-1, 1)[0].detach()
            torch.testing.assert_close(sheet[row, column], expected, rtol=0, atol=1e-12)


def test_traversal_varies_one_at_a_time_the_dimensions_of_largest_kl():
    vae, whole, made = visualized(16, 6)
    posterior = vae.encoder(STANDARD.scale(whole.images, torch.float64))
    kl = posterior.kl().mean(0).detach()
    order = sorted(range(6), key=lambda dim: -float(kl[dim]))
    for row, dim in enumerate(order):
        for column, value in ((0, -3.0), (3, -1.0), (9, 3.0)):
            z = posterior.mu[:1].clone()
            z[0, dim] = value
            expected = vae.decoder(z).mean.clamp(-1, 1)[0].detach()
            torch.testing.assert_close(made["traversal"][row, column], expected, rtol=0, atol=1e-12)
