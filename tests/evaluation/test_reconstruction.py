"""Reconstruction error of a VAE, by hand and for a known error."""

from __future__ import annotations

import math

import numpy as np
import pytest
import small_vae
import torch
from array_images import ArrayImages
from torch import Tensor

from dgm.evaluation.image_similarity import ssim
from dgm.evaluation.likelihood import ImageSubset
from dgm.evaluation.reconstruction import reconstruction_error
from dgm.objective import Batch, Nets
from dgm.rng import Draws
from dgm.training.engine import Engine


def noise(side: int) -> ArrayImages:
    return ArrayImages(np.random.default_rng(0).integers(20, 200, (12, side, side, 3), np.uint8))


class Shifted(small_vae.VAEObjective):
    """Reconstructs every image some grey levels lighter."""

    shift = 5

    def encode(self, nets: Nets, batch: Batch, draws: Draws) -> Tensor:
        return batch.images.permute(0, 3, 1, 2).double()

    def decode(self, nets: Nets, z: Tensor, labels: Tensor | None = None) -> Tensor:
        return (z + self.shift) / 127.5 - 1


def test_a_known_error_is_found_in_grey_levels(engine: Engine) -> None:
    objective = Shifted(small_vae.SMALL, small_vae.VAESampleConfig(), 6, torch.float64)
    data = noise(16)
    found = reconstruction_error(objective, {}, ImageSubset(engine, data, torch.arange(12), 0))
    assert found["rms_error_grey_levels"] == pytest.approx(5)
    assert found["psnr_db"] == pytest.approx(20 * math.log10(255 / 5))
    real = torch.from_numpy(data.pixels).permute(0, 3, 1, 2).double()
    assert found["ssim"] == pytest.approx(float(ssim(real + 5, real).mean()))


def test_error_is_that_of_decoded_means_and_small_images_have_no_ssim(engine: Engine) -> None:
    torch.manual_seed(0)
    net, objective, data = small_vae.net(), small_vae.objective(), noise(8)
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
