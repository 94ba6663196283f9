"""The density that a diffusion model gives images, by its probability-flow ODE.

With alpha = cos(phi) and sigma = sin(phi) the ODE is dx / dphi = v(x), where v = alpha eps - sigma
x_0 as the net predicts them, and the log-density along a path changes by -div v (Song et al. 2021,
"Score-based generative modeling through SDEs", equation 39; Chen et al. 2018).

It is integrated over tau = log tan(phi / 2) = log(sigma / (1 + alpha)), dx / dtau = sigma v: where
sigma is small, div v grows as 1 / sigma, and sigma div v does not; where alpha is small, tau is phi
but for a constant, and finite at pure noise.
"""

from __future__ import annotations

import bisect
import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from dgm.diffusion.objective import DiffusionObjective
from dgm.diffusion.samplers import Denoiser
from dgm.diffusion.schedule import Schedule
from dgm.errors import UserError
from dgm.objective import Batch, Nets
from dgm.rng import Draws

MIN_STEPS = 4  # so that there are three paths to compare


class OdeNats(NamedTuple):
    """The ODE's bound of each image, nats [B], and how far off it may be."""

    nats: Tensor
    discretization_error: Tensor  # signed, so that a mean over images may be taken


def ode_nats(
    objective: DiffusionObjective, nets: Nets, batch: Batch, draws: Draws, steps: int
) -> OdeNats:
    """Return the ODE's bound on -log p of stored images, extrapolated to infinitely many steps.

    The images are dequantised uniformly within the bins of the pixel map that the net was trained
    with (Theis et al. 2016, section 3.1), and taken for images at the first noise level, where the
    net's knowledge ends. A bound on average over the draws of dequantisation and of the
    divergence's probe, up to the error of the discretisation.

    Heun's rule is of order 2: of two paths, one with twice the steps of the other, the value for
    infinitely many is fine + (fine - coarse) / 3 (Richardson 1911). The estimated error is the
    difference of two such values, from `steps` and half as many, and from half and a quarter: that
    of the second, so larger than that of the first, which is returned.

    Takes 3.5 evaluations of net and gradient for each step. Raise UserError for fewer than 4 steps.
    """
    labels = None if objective.num_classes is None else batch.labels
    denoiser = objective.denoiser(nets["net"], labels, clip=False)
    x = objective.pixels.dequantize(batch.images, draws, objective.dtype)
    fine = path(objective.schedule, steps)
    quarter, half, whole = (
        ode_log_density(denoiser, x, objective.schedule, fine[::stride], draws)
        for stride in (4, 2, 1)
    )
    better, worse = whole + (whole - half) / 3, half + (half - quarter) / 3
    nats = -better - x[0].numel() * math.log(objective.pixels.bin_width)
    return OdeNats(nats, worse - better)


def ode_log_density(
    denoiser: Denoiser, x: Tensor, schedule: Schedule, timesteps: list[int], draws: Draws | None
) -> Tensor:
    """Return the log-density that the ODE gives x [B, C, H, W] at timesteps[0], nats [B].

    By Heun's rule in tau through the given timesteps, two evaluations a step, the last of which
    counts as pure noise. The divergence is estimated by one Rademacher probe for each image
    (Hutchinson 1990), the same along its path; or computed exactly where `draws` is None, which
    takes a pass for each pixel.
    """
    probe = None if draws is None else _probe(x, draws)
    alphas, sigmas = schedule.alphas.tolist(), schedule.sigmas.tolist()
    tau = _tau(schedule).tolist()
    gained = x.new_zeros(len(x), dtype=torch.float64)

    def flow(x: Tensor, t: int) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            out = denoiser(x, t)
            slope = sigmas[t] * (alphas[t] * out.eps - sigmas[t] * out.x_0)
            return slope.detach(), _divergence(slope, x, probe)

    for t, following in itertools.pairwise(timesteps):
        step = tau[following] - tau[t]
        slope, divergence = flow(x, t)
        ahead, divergence_ahead = flow(x + step * slope, following)
        x = x + step / 2 * (slope + ahead)
        gained += step / 2 * (divergence + divergence_ahead)
    squares = x.double().square().flatten(1)
    return gained - 0.5 * (squares + math.log(2 * math.pi)).sum(1)


def path(schedule: Schedule, steps: int) -> list[int]:
    """Return timesteps from 0 to T - 1, evenly in tau, in a multiple of 4 steps.

    `steps` rounded up, or about as many as the schedule has. Raise UserError where that is too few.
    """
    total = schedule.num_timesteps
    if steps < MIN_STEPS:
        raise UserError(f"the ODE's density takes {MIN_STEPS} steps or more, not {steps}")
    if total <= MIN_STEPS:
        raise UserError(
            f"diffusion.num_timesteps is {total}, too few for the ODE's density: measure "
            f"bits_per_dim, or train with {MIN_STEPS + 1} or more"
        )
    tau = _tau(schedule)
    steps = min(-(-steps // MIN_STEPS), (total - 1) // MIN_STEPS) * MIN_STEPS

    def nearest(count: int) -> list[int]:
        even = torch.linspace(float(tau[0]), float(tau[-1]), count + 1, dtype=torch.float64)
        after = torch.searchsorted(tau, even).clamp(1, total - 1)
        closer_before = (even - tau[after - 1] < tau[after] - even).long()
        return sorted({0, *(after - closer_before).tolist(), total - 1})

    # Where timesteps lie far apart in tau, several points fall on one: find how many it takes.
    most = 8 * total
    count = bisect.bisect_left(range(most), steps + 1, key=lambda n: len(nearest(n)))
    for more in itertools.chain(range(count, count + 64), range(count, 0, -1)):
        found = nearest(more)
        if (len(found) - 1) % MIN_STEPS == 0 and len(found) > MIN_STEPS:
            return found
    # A schedule of few timesteps, most of them next to pure noise: evenly among those there are.
    return [round(i * (total - 1) / steps) for i in range(steps + 1)]


def _tau(schedule: Schedule) -> Tensor:
    """Return log(sigma / (1 + alpha)) of each timestep, float64 [T]."""
    return (schedule.sigmas / (1 + schedule.alphas)).log()


def _probe(x: Tensor, draws: Draws) -> Tensor:
    _, channels, height, width = x.shape
    signs = draws.keep_mask("probe", (height, width, channels), 0.5)
    return signs.permute(0, 3, 1, 2).to(x.dtype) * 2 - 1


def _divergence(v: Tensor, x: Tensor, probe: Tensor | None) -> Tensor:
    """Return the sum of dv_i / dx_i of each image, float64 [B]."""
    if probe is not None:
        (product,) = torch.autograd.grad(v, x, probe)
        return (product * probe).double().flatten(1).sum(1)
    flat, total = v.flatten(1), x.new_zeros(len(x), dtype=torch.float64)
    for i in range(flat.shape[1]):
        (row,) = torch.autograd.grad(flat[:, i].sum(), x, retain_graph=True)
        total += row.flatten(1)[:, i].double()
    return total
