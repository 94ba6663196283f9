"""What is left of images that go through a VAE's latents."""

from __future__ import annotations

import torch
from torch import Tensor

from dgm.evaluation.image_similarity import SMALLEST, ssim
from dgm.evaluation.likelihood import over_images
from dgm.objective import Batch, Nets
from dgm.rng import Draws
from dgm.training.device_loader import Images
from dgm.training.engine import Engine
from dgm.vae.objective import VAEObjective

_WHITE = 255.0


def reconstruction_error(
    engine: Engine, objective: VAEObjective, nets: Nets, data: Images, index: Tensor, seed: int
) -> dict[str, float]:
    """Measure how far images [N] lie from the decoder's means of the encoder's means.

    `rms_error_grey_levels`: root of the mean square over all images, 0 to 255; `psnr_db` of the
    same, 20 log10(255 / it); `ssim`, a mean over images that are large enough. All processes ask.
    """

    def of(given: Batch, draws: Draws) -> Tensor:
        x = given.images.permute(0, 3, 1, 2).double()
        made = objective.decode(nets, objective.encode(nets, given, draws)).double()
        again = objective.pixels.to_levels(made)
        square = (again - x).square().mean((1, 2, 3))
        large = min(x.shape[-2:]) >= SMALLEST
        return torch.stack([square, ssim(again, x) if large else square * torch.nan], dim=1)

    square, alike = over_images(engine, data, index, seed, of).mean(0)
    error = square.sqrt()
    found = {
        "rms_error_grey_levels": float(error),
        "psnr_db": float(20 * torch.log10(_WHITE / error)),
    }
    return found if alike.isnan() else {**found, "ssim": float(alike)}
