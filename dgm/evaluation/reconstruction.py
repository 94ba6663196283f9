"""How well a VAE's latents describe images: reconstruction error and active dimensions."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from dgm.evaluation.image_similarity import MIN_SIDE, ssim
from dgm.evaluation.likelihood import ImageSubset
from dgm.objective import Batch, Nets
from dgm.rng import Draws
from dgm.vae.objective import VAEObjective

_WHITE = 255.0
ACTIVE_VARIANCE = 0.01  # as in Burda et al. 2016


def reconstruction_error(
    objective: VAEObjective, nets: Nets, images: ImageSubset
) -> dict[str, float]:
    """Compare images with their reconstructions, the decoder's means at the encoder's means.

    `rms_error_grey_levels`: root mean square over all images, 0 to 255; `psnr_db`: the same
    error as 20 log10(255 / RMS); `ssim`, a mean over images, if they are large enough.
    Collective: call on all ranks.
    """

    def compare(batch: Batch, draws: Draws) -> Tensor:
        x = batch.images.permute(0, 3, 1, 2).double()
        decoded = objective.decode(nets, objective.encode(nets, batch, draws)).double()
        reconstruction = objective.pixels.to_levels(decoded)
        square = (reconstruction - x).square().mean((1, 2, 3))
        large = min(x.shape[-2:]) >= MIN_SIDE
        similarity = ssim(reconstruction, x) if large else square * torch.nan
        return torch.stack([square, similarity], dim=1)

    square, similarity = images.map(compare).mean(0)
    error = square.sqrt()
    metrics = {
        "rms_error_grey_levels": float(error),
        "psnr_db": float(20 * torch.log10(_WHITE / error)),
    }
    return metrics if similarity.isnan() else {**metrics, "ssim": float(similarity)}


def active_latents(objective: VAEObjective, nets: Nets, images: ImageSubset) -> dict[str, float]:
    """Count the active latent dimensions on images.

    Dimension u is active if Cov_x(E_{q(u | x)}[u]) > 0.01, the variance over images of the
    posterior's mean (Burda et al. 2016, "Importance weighted autoencoders", section 5.2). It is
    computed in float64 over all N images (sum of squares over N), so it does not depend on the
    number of processes or on how images are batched; no dimension of a single image is active.

    Return `active_latents`, the fraction of all dimensions in [0, 1], and `num_active`, their
    number. Collective: call on all ranks.
    """

    variance = images.map(partial(objective.encode, nets)).var(0, correction=0)
    active = variance > ACTIVE_VARIANCE
    return {"active_latents": float(active.double().mean()), "num_active": int(active.sum())}
