"""Active latent dimensions of an encoder whose variances are known, and reconstruction error.

Source: Burda et al. 2016, "Importance weighted autoencoders", section 5.2: dimension u is active if
Cov_x(E_{q(u | x)}[u]) > 10^-2. The encoder here is linear in planted coordinates of the images, so
that the variance of each mean is known beforehand.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import small_vae
import torch
from array_images import ArrayImages
from torch import Tensor

from dgm.evaluation.likelihood import ImageSubset
from dgm.evaluation.reconstruction import active_latents, reconstruction_error
from dgm.objective import Batch, Nets
from dgm.rng import Draws
from dgm.training.engine import Engine


class Planted(ArrayImages):
    """Images whose first pixels are grey levels 100 +- 1 in every combination, twice over."""

    def __init__(self, bits: int = 6, side: int = 4):
        codes = np.arange(2 * 2**bits) % 2**bits
        signs = 2 * (codes[:, None] >> np.arange(bits) & 1) - 1
        pixels = np.full((len(codes), side, side, 3), 7, np.uint8)
        pixels.reshape(len(codes), -1)[:, :bits] = 100 + signs
        super().__init__(pixels)


# Standard deviations of the means of q(u | x): 0.1 is where a dimension becomes active.
DEVIATIONS = torch.tensor([2.0, 0.101, 0.099, 0.0, 0.5, 0.01], dtype=torch.float64)


class Linear(small_vae.VAEObjective):
    """A VAE that encodes to means far from 0, linear in the signs of the planted coordinates."""

    def encode(self, nets: Nets, batch: Batch, draws: Draws) -> Tensor:
        signs = batch.images.flatten(1)[:, :6].double() - 100
        return 30 + DEVIATIONS * signs


def measure(engine: Engine, index: Tensor) -> dict[str, float]:
    objective = Linear(small_vae.SMALL, small_vae.VAESampleConfig(), 6, torch.float64)
    return active_latents(objective, {}, ImageSubset(engine, Planted(), index, 0))


def test_dimensions_of_enough_variance_are_active(engine: Engine):
    found = measure(engine, torch.arange(128))
    assert found == {"active_latents": pytest.approx(3 / 6), "num_active": 3}


def test_order_and_repetition_of_images_do_not_matter(engine: Engine):
    order = torch.randperm(128, generator=torch.Generator().manual_seed(0))
    assert measure(engine, order) == measure(engine, torch.arange(64))


def test_equal_images_have_no_active_dimension(engine: Engine):
    assert measure(engine, torch.zeros(5, dtype=torch.int64))["num_active"] == 0
    assert measure(engine, torch.tensor([3]))["active_latents"] == 0


def test_a_mean_far_from_the_priors_is_not_active_where_it_is_constant(engine: Engine):
    # Its KL is large but the same for every image.
    torch.manual_seed(0)
    net, objective = small_vae.net(), small_vae.objective()
    with torch.no_grad():
        net.encoder.exit.weight.zero_()
        net.encoder.exit.bias.fill_(1.0)
    data, index = Planted(side=8), torch.arange(8)
    given = Batch(torch.from_numpy(data.pixels[:8]), torch.zeros(8, dtype=torch.int64))
    assert (objective.kl_by_latent({"vae": net}, given) > 0.01).all()
    found = active_latents(objective, {"vae": net}, ImageSubset(engine, data, index, 0))
    assert found == {"active_latents": 0, "num_active": 0}


def test_error_is_that_of_decoded_means_and_small_images_have_no_ssim(engine: Engine) -> None:
    torch.manual_seed(0)
    net, objective = small_vae.net(), small_vae.objective()
    data = ArrayImages(np.random.default_rng(0).integers(20, 200, (12, 8, 8, 3), np.uint8))
    index = torch.tensor([7, 2, 3])
    found = reconstruction_error(objective, {"vae": net}, ImageSubset(engine, data, index, 0))
    real = torch.from_numpy(data.images(index.numpy())).permute(0, 3, 1, 2).double()
    with torch.no_grad():
        again = net.decoder(net.encoder(real / 127.5 - 1).mu).mean.clamp(-1, 1)
    error = ((again + 1) * 127.5 - real).square().mean().sqrt()
    assert found == {
        "rms_error_grey_levels": pytest.approx(float(error)),
        "psnr_db": pytest.approx(20 * math.log10(255 / float(error))),
    }
