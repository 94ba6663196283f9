"""Noise real images a part of the way, and denoise them from there."""

from __future__ import annotations

import torch
from torch import Tensor

from dgm.diffusion.objective import DiffusionObjective
from dgm.diffusion.samplers import SamplerName, run_sampler
from dgm.diffusion.schedule import Schedule
from dgm.objective import Nets
from dgm.rng import Draws


def noise(objective: DiffusionObjective, images: Tensor, draws: Draws, steps: int) -> Tensor:
    """Noise stored images uint8 [B, H, W, C] by the first `steps` of the run's schedule, 1 to T.

    q(x_t | x_0) at t = steps - 1 (Ho et al. 2020, equation 4): [B, C, H, W].
    """
    schedule, x_0 = objective.schedule, objective.pixels.scale(images, objective.dtype)
    eps = draws.normal("noise", objective.image_shape, objective.dtype).permute(0, 3, 1, 2)
    return float(schedule.alphas[steps - 1]) * x_0 + float(schedule.sigmas[steps - 1]) * eps


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
    """Denoise x [B, C, H, W], noised by `steps` of the run's schedule, to images in [-1, 1].

    The sampler goes over the first `steps` timesteps: all of them, or `evaluations` of them.
    """
    own = Schedule(objective.schedule.alphas_cumprod[:steps])
    told = None if objective.num_classes is None else labels
    denoiser = objective.denoiser(nets["net"], told, guidance, objective.sample_config.clip)
    variance = objective.sample_config.variance
    count = min(steps, evaluations or steps)
    return run_sampler(sampler, denoiser, x, own, draws, count, variance=variance).clamp(-1, 1)
