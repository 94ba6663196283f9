"""How many of a VAE's latent dimensions carry information about the image."""

from __future__ import annotations

import torch
from torch import Tensor

from dgm.evaluation.likelihood import over_images
from dgm.objective import Batch, Nets
from dgm.rng import Draws
from dgm.training.device_loader import Images
from dgm.training.engine import Engine
from dgm.vae.objective import VAEObjective

ACTIVE_VARIANCE = 0.01  # of Burda et al. 2016


def active_latents(
    engine: Engine, objective: VAEObjective, nets: Nets, data: Images, index: Tensor, seed: int
) -> dict[str, float]:
    """Count the active latent dimensions on the images at `index`, [N].

    Dimension u is active if Cov_x(E_{q(u | x)}[u]) > 0.01, the variance over images of the
    posterior's mean (Burda et al. 2016, "Importance weighted autoencoders", section 5.2). It is
    computed in float64 over all N images (sum of squares over N), so it does not depend on the
    number of processes or on how images are batched; no dimension of a single image is active.

    Return `active_latents`, the fraction of all dimensions in [0, 1], and `num_active`, their
    number. Collective: call on all ranks.
    """

    def means(given: Batch, draws: Draws) -> Tensor:
        with torch.no_grad():
            return objective.encode(nets, given, draws)

    variance = over_images(engine, data, index, seed, means).var(0, correction=0)
    active = variance > ACTIVE_VARIANCE
    return {"active_latents": float(active.double().mean()), "num_active": int(active.sum())}
