"""Noise real images part of the way and denoise them from there (SDEdit, Meng et al. 2022)."""

from __future__ import annotations

import torch
from torch import Tensor

from dgm.diffusion.objective import DiffusionObjective
from dgm.diffusion.parameterization import q_sample
from dgm.diffusion.samplers import SamplerName, run_sampler
from dgm.diffusion.schedule import Schedule
from dgm.objective import Nets
from dgm.rng import Draws


def noise(objective: DiffusionObjective, images: Tensor, draws: Draws, steps: int) -> Tensor:
    """Return x_t of stored images uint8 [B, H, W, C] at t = steps - 1, [B, C, H, W].

    `steps`: number of steps of the run's schedule, 1 to T.
    """
    x_0, eps = objective.pixels.scale(images, objective.dtype), objective.noise(draws, "noise")
    alpha, sigma = objective.schedule.alphas[steps - 1], objective.schedule.sigmas[steps - 1]
    return q_sample(x_0, eps, float(alpha), float(sigma))


@torch.no_grad()
def denoise(
    objective: DiffusionObjective,
    nets: Nets,
    x: Tensor,
    labels: Tensor | None,
    draws: Draws,
    steps: int,
    sampler: SamplerName = "ddpm",
    evaluations: int | None = None,
    guidance: float = 1.0,
) -> Tensor:
    """Return images in [-1, 1], denoised from x [B, C, H, W] at t = steps - 1.

    The sampler visits all of the first `steps` timesteps, or `evaluations` of them if fewer.
    """
    schedule = Schedule(objective.schedule.alphas_cumprod[:steps])
    denoiser = objective.denoiser(nets["net"], labels, guidance, objective.sample_config.clip)
    variance = objective.sample_config.variance
    count = min(steps, evaluations or steps)
    x = run_sampler(sampler, denoiser, x, schedule, draws, count, variance=variance)
    return x.clamp(-1, 1)
