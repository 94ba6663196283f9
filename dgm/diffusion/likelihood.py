"""The variational bound of a diffusion model, in nats, term by term.

-log p(x_0) <= L_T + E[L_0 + ... + L_{T-1}] over q(x_t | x_0) (Ho et al. 2020, equation 5; index t
is t + 1 in the paper). For t > 0, L_t = KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)). L_0 is
-log of the mass that a Gaussian assigns to the stored pixel value's bin (equation 13), and
L_T = KL(q(x_T | x_0) || N(0, I)) is computed by `prior_kl`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dgm.diffusion.schedule import Schedule
from dgm.preprocessing import PixelMap


@dataclass(frozen=True)
class ReverseSteps:
    """Coefficients of q(x_{t-1} | x_t, x_0), and the model's log variances, each [T].

    The mean is mean_x_0 x_0 + mean_x_t x_t (Ho et al. 2020, equation 7). At t = 0 the posterior
    variance beta_tilde is 0; as in the code of Ho et al. and of Nichol and Dhariwal, that of t = 1
    is used instead, also if the model's fixed variance is beta.
    """

    mean_x_0: Tensor
    mean_x_t: Tensor
    log_posterior: Tensor  # log beta_tilde
    log_beta: Tensor
    log_large: Tensor  # log beta, but log beta_tilde at t = 0

    @classmethod
    def of(cls, schedule: Schedule, device: torch.device, dtype: torch.dtype) -> ReverseSteps:
        """Return the coefficients, computed in float64: in float32 a step's 1 - alpha^2 cancels."""
        betas, cumulative = schedule.betas, schedule.alphas_cumprod
        before = torch.cat([torch.ones(1, dtype=torch.float64), cumulative[:-1]])
        variance = betas * (1 - before) / (1 - cumulative)
        log_posterior = torch.cat([variance[1:2], variance[1:]]).log()
        tables = (
            before.sqrt() * betas / (1 - cumulative),
            (cumulative / before).sqrt() * (1 - before) / (1 - cumulative),
            log_posterior,
            betas.log(),
            torch.cat([log_posterior[:1], betas[1:].log()]),
        )
        return cls(*(table.to(device, dtype) for table in tables))


def bound_term(
    steps: ReverseSteps, t: Tensor, x_0: Tensor, x_t: Tensor, x_0_hat: Tensor,
    variance: Tensor | Literal["small", "large"], pixels: PixelMap,
) -> Tensor:  # fmt: skip
    """Return L_t of each image, nats [B].

    t: int64 [B]; images [B, C, H, W]. `variance` is beta_tilde (small), beta (large), or a fraction
    in [0, 1] of the way from log beta_tilde to log beta (Nichol and Dhariwal 2021, equation 15).
    """

    def at(values: Tensor) -> Tensor:
        return values[t][:, None, None, None]

    mean_x_0, mean_x_t = at(steps.mean_x_0), at(steps.mean_x_t)
    true_mean = mean_x_0 * x_0 + mean_x_t * x_t
    mean = mean_x_0 * x_0_hat + mean_x_t * x_t
    true_log_variance = at(steps.log_posterior)
    if variance == "small":
        log_variance = true_log_variance.expand_as(x_0)
    elif variance == "large":
        log_variance = at(steps.log_large).expand_as(x_0)
    else:
        log_variance = variance * at(steps.log_beta) + (1 - variance) * true_log_variance
    divergence = 0.5 * (
        log_variance
        - true_log_variance
        + torch.exp(true_log_variance - log_variance)
        + (true_mean - mean) ** 2 * torch.exp(-log_variance)
        - 1
    )
    decoder = discretized_gaussian_nll(x_0, mean, 0.5 * log_variance, pixels)
    return torch.where((t == 0)[:, None, None, None], decoder, divergence).flatten(1).sum(1)


def prior_kl(schedule: Schedule, x_0: Tensor) -> Tensor:
    """Return KL(q(x_T | x_0) || N(0, 1)) of each image, nats [B]."""
    alpha2 = float(schedule.alphas_cumprod[-1])
    variance = 1 - alpha2
    kl = 0.5 * (variance + alpha2 * x_0**2 - 1 - math.log(variance))
    return kl.flatten(1).sum(1)


def discretized_gaussian_nll(
    x: Tensor, mean: Tensor, log_scale: Tensor, pixels: PixelMap
) -> Tensor:
    """Return -log of a Gaussian's mass in the bin of x (Ho et al. 2020, equation 13), nats.

    x may lie anywhere in a bin of `pixels`; those of levels 0 and 255 reach to infinity. Masses
    are clamped to 1e-12, as in the code of Ho et al.
    """
    levels = (pixels.to_levels(x) + 0.5).floor()
    inverse, half = torch.exp(-log_scale), pixels.bin_width / 2
    centered = pixels.from_levels(levels) - mean
    # Differences are taken in the lower tail, where float32 keeps their digits.
    lower = -centered.abs()
    mass = _normal_cdf((lower + half) * inverse) - _normal_cdf((lower - half) * inverse)
    mass = torch.where(levels == 255, _normal_cdf((half - centered) * inverse), mass)
    mass = torch.where(levels == 0, _normal_cdf((half + centered) * inverse), mass)
    return -torch.log(mass.clamp(min=1e-12))


def _normal_cdf(z: Tensor) -> Tensor:
    # torch.special.ndtr is (1 + erf) / 2, which has no correct digits at -5.
    return 0.5 * torch.special.erfc(-z * math.sqrt(0.5))
