"""The variational bound of a diffusion model, in nats, term by term.

-log p(x_0) <= prior + sum over t of L_t (Ho et al. 2020, equation 5): L_t for t > 0 is the
divergence between the true and the modelled step, L_0 a Gaussian's mass in the pixel's grey level.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dgm.diffusion.schedule import Schedule


def term(
    schedule: Schedule,
    t: Tensor,
    x_0: Tensor,
    x_t: Tensor,
    x_0_hat: Tensor,
    variance_fraction: Tensor | None,
) -> Tensor:
    """Compute L_t of each image, nats [B].

    t: int64 [B]; images [B, C, H, W]; `variance_fraction` in [0, 1] picks between log beta_tilde
    and log beta (Nichol and Dhariwal 2021, equation 15); None means beta.
    """
    alphas, sigmas = schedule.alphas.to(x_0), schedule.sigmas.to(x_0)
    # In float64 first: 1 - alpha^2 of one step cancels badly in float32.
    betas64 = schedule.betas
    before64 = torch.cat([torch.ones(1, dtype=torch.float64), schedule.alphas_cumprod[:-1]])
    tilde64 = betas64 * (1 - before64) / (1 - schedule.alphas_cumprod)
    tilde64[0] = tilde64[1]  # beta_tilde of the first step is 0, its logarithm is not needed

    def at(values: Tensor) -> Tensor:
        return values.to(x_0)[t][:, None, None, None]

    before = at(before64.sqrt())
    mean_x_0 = before * at(betas64) / at(sigmas) ** 2
    mean_x_t = (at(alphas) / before) * (1 - before**2) / at(sigmas) ** 2
    true_mean = mean_x_0 * x_0 + mean_x_t * x_t
    mean = mean_x_0 * x_0_hat + mean_x_t * x_t
    true_log_variance, log_beta = at(tilde64.log()), at(betas64.log())
    fraction = torch.ones_like(x_0) if variance_fraction is None else variance_fraction
    log_variance = fraction * log_beta + (1 - fraction) * true_log_variance
    divergence = 0.5 * (
        log_variance
        - true_log_variance
        + torch.exp(true_log_variance - log_variance)
        + (true_mean - mean) ** 2 * torch.exp(-log_variance)
        - 1
    )
    first = grey_level_nll(x_0, mean, 0.5 * log_variance)
    return torch.where((t == 0)[:, None, None, None], first, divergence).flatten(1).sum(1)


def prior(schedule: Schedule, x_0: Tensor) -> Tensor:
    """Compute KL(q(x_T | x_0) || N(0, 1)) of each image, nats [B]."""
    alpha2 = float(schedule.alphas_cumprod[-1])
    variance = 1 - alpha2
    kl = 0.5 * (variance + alpha2 * x_0**2 - 1 - math.log(variance))
    return kl.flatten(1).sum(1)


def grey_level_nll(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Compute -log of a Gaussian's mass in the grey level of x (Ho et al. 2020, equation 13).

    x holds 256 levels from -1 to 1; the first and last level reach to infinity.
    """
    inverse, centred, half = torch.exp(-log_scale), x - mean, 1 / 255
    # Differences are taken in the lower tail, where float32 keeps their digits.
    lower = -centred.abs()
    mass = _below((lower + half) * inverse) - _below((lower - half) * inverse)
    mass = torch.where(x > 0.999, _below((half - centred) * inverse), mass)
    mass = torch.where(x < -0.999, _below((half + centred) * inverse), mass)
    return -torch.log(mass.clamp(min=1e-12))


def _below(z: Tensor) -> Tensor:
    # torch.special.ndtr is (1 + erf) / 2, which has no digits left at -5.
    return 0.5 * torch.special.erfc(-z * math.sqrt(0.5))
