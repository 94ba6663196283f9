"""The density that a diffusion model gives images, by its probability-flow ODE.

With alpha = cos(angle) and sigma = sin(angle) the ODE is dx / d angle = v(x), where v = alpha eps -
sigma x_0 as the net predicts them, and the log-density along a path changes by -div v (Song et al.
2021, "Score-based generative modeling through SDEs", equation 39; Chen et al. 2018).
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from dgm.diffusion.objective import DiffusionObjective
from dgm.diffusion.samplers import Denoiser
from dgm.diffusion.schedule import Schedule
from dgm.objective import Batch, Nets
from dgm.pixels import dequantize
from dgm.rng import Draws

GREY_LEVEL = 1 / 128  # of dequantised images


def ode_nats(
    objective: DiffusionObjective, nets: Nets, batch: Batch, draws: Draws, steps: int
) -> Tensor:
    """Bound -log p of stored images from above by the ODE's density, nats [B].

    The images are dequantised uniformly (Theis et al. 2016, section 3.1), and taken for images at
    the first noise level, where the net's knowledge ends. A bound on average over the draws of
    dequantisation and of the divergence's probe, up to the error of `steps` steps.
    """
    labels = None if objective.num_classes is None else batch.labels
    denoiser = objective.denoiser(nets["net"], labels, clip=False)
    x = dequantize(batch.images, draws, objective.dtype)
    log_density = ode_log_density(denoiser, x, objective.schedule, steps, draws)
    return -log_density - x[0].numel() * math.log(GREY_LEVEL)


def ode_log_density(
    denoiser: Denoiser, x: Tensor, schedule: Schedule, steps: int, draws: Draws | None
) -> Tensor:
    """Compute the log-density, nats [B], that the ODE gives x [B, C, H, W] at the first timestep.

    From there to pure noise by Heun's rule in the angle, two evaluations a step. The divergence is
    estimated by one Rademacher probe for each image (Hutchinson 1990), the same along its path; or
    computed exactly where `draws` is None, which takes a pass for each pixel.
    """
    probe = None if draws is None else _probe(x, draws)
    alphas, sigmas = schedule.alphas.tolist(), schedule.sigmas.tolist()
    angles = [math.atan2(sigma, alpha) for alpha, sigma in zip(alphas, sigmas, strict=True)]
    chosen = path(schedule, steps)
    gained = x.new_zeros(len(x), dtype=torch.float64)

    def flow(x: Tensor, t: int) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            here = x.detach().requires_grad_(True)
            said = denoiser(here, t)
            v = alphas[t] * said.eps - sigmas[t] * said.x_0
            return v.detach(), _divergence(v, here, probe)

    for here, there in itertools.pairwise(chosen):
        step = angles[there] - angles[here]
        v, spread = flow(x, here)
        ahead, spread_ahead = flow(x + step * v, there)
        x = x + step / 2 * (v + ahead)
        gained += step / 2 * (spread + spread_ahead)
    squares = x.double().square().flatten(1)
    return gained - 0.5 * (squares + math.log(2 * math.pi)).sum(1)


def path(schedule: Schedule, steps: int) -> list[int]:
    """Choose `steps` + 1 timesteps from 0 to T - 1, evenly in log(alpha / sigma); fewer if T is."""
    # Where next to nothing of the image is left, steps would be wasted.
    ratio = 0.5 * schedule.snr.clamp(min=1e-5).log()
    wanted = torch.linspace(float(ratio[0]), float(ratio[-1]), steps + 1, dtype=torch.float64)
    rows = torch.searchsorted(-ratio, -wanted[:-1]).clamp(max=schedule.num_timesteps - 1)
    return sorted({0, *rows.tolist(), schedule.num_timesteps - 1})


def _probe(x: Tensor, draws: Draws) -> Tensor:
    _, channels, height, width = x.shape
    signs = draws.keep_mask("probe", (height, width, channels), 0.5)
    return signs.permute(0, 3, 1, 2).to(x.dtype) * 2 - 1


def _divergence(v: Tensor, x: Tensor, probe: Tensor | None) -> Tensor:
    """Sum dv_i / dx_i of each image, float64 [B]."""
    if probe is not None:
        (product,) = torch.autograd.grad(v, x, probe)
        return (product * probe).double().flatten(1).sum(1)
    flat, total = v.flatten(1), x.new_zeros(len(x), dtype=torch.float64)
    for i in range(flat.shape[1]):
        (row,) = torch.autograd.grad(flat[:, i].sum(), x, retain_graph=True)
        total += row.flatten(1)[:, i].double()
    return total
