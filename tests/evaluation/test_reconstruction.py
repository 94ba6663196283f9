"""Reconstruction error of a VAE, by hand; for a known error: references/test_pixel_map_users."""

from __future__ import annotations

import math

import numpy as np
import pytest
import small_vae
import torch
from array_images import ArrayImages

from dgm.evaluation.likelihood import ImageSubset
from dgm.evaluation.reconstruction import reconstruction_error
from dgm.training.engine import Engine


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
