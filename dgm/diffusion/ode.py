"""The density that a diffusion model assigns to images, by its probability-flow ODE.

With alpha = cos(phi) and sigma = sin(phi) the ODE is dx / dphi = v(x), where v = alpha eps - sigma
x_0 with the network's estimates, and the log-density on a path changes by -div v (Song et al. 2021,
"Score-based generative modeling through SDEs", equation 39; Chen et al. 2018).

It is integrated over tau = log tan(phi / 2) = log(sigma / (1 + alpha)), with dx / dtau = sigma v:
at small sigma, div v grows as 1 / sigma but sigma div v stays bounded; at small alpha, tau is
phi - pi / 2 to first order and so finite at pure noise. A net that predicts eps has
v = (eps - sigma x) / alpha, whose error grows as 1 / alpha; its ODE is integrated over -lambda
instead, lambda = log(alpha / sigma) (half the log-SNR), with dx / d(-lambda) = alpha sigma v.
"""

from __future__ import annotations

import bisect
import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from dgm.common.errors import UserError
from dgm.diffusion.objective import DiffusionObjective
from dgm.diffusion.parameterization import PredictionKind, to_prediction
from dgm.diffusion.samplers import Denoiser
from dgm.diffusion.schedule import Schedule
from dgm.objective import Batch, Nets
from dgm.rng import Draws

MIN_STEPS = 8  # so that n, n / 2, n / 4 and n / 8 steps are whole numbers
MIN_TIMESTEPS = 4 * MIN_STEPS + 1
_MAX_SNR, _MAX_SNR_BEFORE_GAP, _GAP = 1e-4, 0.01, 0.5  # see `_last`
_RATIO = 8  # Heun extrapolated once is of order 3: twice the steps divide its change by 8


class OdeNats(NamedTuple):
    """The ODE's bound of each image with n steps, nats, and its changes with n; each [B]."""

    nats: Tensor
    change: Tensor  # value at n / 2 steps minus value at n
    change_before: Tensor  # value at n / 4 steps minus value at n / 2


def discretization_error(found: OdeNats) -> float:
    """Return the estimated discretization error of the mean over images, nats.

    It is the change of the mean when the steps were last doubled or, if larger, 1/8 of the change
    before: a single change may be small by chance where the error changes sign. As the value is of
    order 3, its true error is usually about 1/7 of the last change.
    """
    last, before = (abs(float(change.mean())) for change in found[1:])
    return max(last, before / _RATIO)


def ode_nats(
    objective: DiffusionObjective, nets: Nets, batch: Batch, draws: Draws, steps: int
) -> OdeNats:
    """Return the ODE's bound on -log p of stored images, extrapolated to infinitely many steps.

    Images are dequantized uniformly within the bins of the objective's pixel map (Theis et al.
    2016, section 3.1), and their density is that of the model at the first noise level, below which
    the net is not trained. The result bounds -log p from above in expectation over dequantization
    and Hutchinson's probe, up to the discretization error.

    Heun's method is of order 2: from values at n and 2 n steps, fine + (fine - coarse) / 3 removes
    the leading error (Richardson extrapolation).

    Each step costs 3.75 evaluations of the net and its gradient. Raise UserError for too few steps.
    """
    denoiser = objective.denoiser(nets["net"], batch.labels, clip=False)
    x = objective.pixels.dequantize(batch.images, draws, objective.dtype)
    schedule, kind = objective.schedule, objective.config.prediction
    fine = path(schedule, steps, kind)
    plain = [
        ode_log_density(denoiser, x, schedule, fine[::stride], draws, kind)
        for stride in (8, 4, 2, 1)
    ]
    values = [fine + (fine - coarse) / 3 for coarse, fine in itertools.pairwise(plain)]
    nats = -values[2] - x[0].numel() * math.log(objective.pixels.bin_width)
    return OdeNats(nats, values[1] - values[2], values[0] - values[1])


def ode_log_density(
    denoiser: Denoiser,
    x: Tensor,
    schedule: Schedule,
    timesteps: list[int],
    draws: Draws | None,
    kind: PredictionKind = "v",
) -> Tensor:
    """Return the log-density that the ODE assigns to x [B, C, H, W] at timesteps[0], nats [B].

    Integrated by Heun's method through `timesteps`, with two evaluations per step; x at the last
    timestep is taken to be N(0, I). The variable is -lambda if `kind` is eps, else tau. The
    divergence is estimated with one Rademacher probe per image (Hutchinson 1990), fixed along the
    path, or computed exactly if `draws` is None, at one backward pass per entry of an image.
    """
    _, channels, height, width = x.shape
    probe = None
    if draws is not None:
        signs = draws.keep_mask("probe", (height, width, channels), 0.5)
        probe = signs.permute(0, 3, 1, 2).to(x.dtype) * 2 - 1
    alphas, sigmas = schedule.alphas.tolist(), schedule.sigmas.tolist()
    time, rates = (values.tolist() for values in _time(schedule, kind))
    log_ratio = x.new_zeros(len(x), dtype=torch.float64)

    def flow(x: Tensor, t: int) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            out = denoiser(x, t)
            slope = rates[t] * to_prediction("v", out.x_0, out.eps, alphas[t], sigmas[t])
            return slope.detach(), _divergence(slope, x, probe)

    for t, next_t in itertools.pairwise(timesteps):
        step = time[next_t] - time[t]
        slope, divergence = flow(x, t)
        next_slope, next_divergence = flow(x + step * slope, next_t)
        x = x + step / 2 * (slope + next_slope)
        log_ratio += step / 2 * (divergence + next_divergence)
    squares = x.double().square().flatten(1)
    return log_ratio - 0.5 * (squares + math.log(2 * math.pi)).sum(1)


def path(schedule: Schedule, steps: int, kind: PredictionKind = "v") -> list[int]:
    """Return timesteps from 0 to `_last`, approximately even in the ODE's variable.

    The number of steps is `steps` rounded up to a multiple of 8, or the largest such multiple that
    the schedule allows. Raise UserError where that is too few.
    """
    if steps < MIN_STEPS:
        raise UserError(f"ode_steps is {steps}: give {MIN_STEPS} or more")
    check_timesteps(schedule.num_timesteps)
    total = _last(schedule, kind) + 1
    time = _time(schedule, kind)[0][:total]
    steps = min(-(-steps // MIN_STEPS), (total - 1) // MIN_STEPS) * MIN_STEPS

    def nearest(count: int) -> list[int]:
        even = torch.linspace(float(time[0]), float(time[-1]), count + 1, dtype=torch.float64)
        after = torch.searchsorted(time, even).clamp(1, total - 1)
        closer_before = (even - time[after - 1] < time[after] - even).long()
        return sorted({0, *(after - closer_before).tolist(), total - 1})

    # Several points may round to one timestep, so search for a count that leaves enough of them.
    count = bisect.bisect_left(range(8 * total), steps + 1, key=lambda n: len(nearest(n)))
    for more in range(count, count + 64):
        found = nearest(more)
        if len(found) > steps and (len(found) - 1) % MIN_STEPS == 0:
            return found
    # The path needs nearly every timestep: space it evenly in t instead.
    return [round(i * (total - 1) / steps) for i in range(steps + 1)]


def _last(schedule: Schedule, kind: PredictionKind) -> int:
    """Return the timestep at which x_t counts as pure noise: T - 1, but an earlier one for eps.

    Near T - 1 the error of v is the error of eps divided by alpha, and a schedule such as cosine
    has such large gaps in lambda there that more steps cannot resolve it. For eps the path ends at
    the first timestep with SNR <= 1e-4, or earlier, at SNR <= 0.01, if all later gaps in lambda
    exceed 0.5. Taking x_t there for N(0, I) costs at most SNR / 2 nats per pixel (|x_0| <= 1).
    """
    last = schedule.num_timesteps - 1
    if kind != "eps":
        return last
    snr, (time, _) = schedule.snr, _time(schedule, kind)
    last = min(last, int((snr > _MAX_SNR).sum()))
    while float(time[last] - time[last - 1]) > _GAP and float(snr[last - 1]) <= _MAX_SNR_BEFORE_GAP:
        last -= 1
    return last


def check_timesteps(total: int) -> None:
    """Raise UserError where a schedule has too few timesteps for the ODE's density."""
    if total < MIN_TIMESTEPS:
        raise UserError(
            f"diffusion.num_timesteps is {total}, too few for bits_per_dim_ode: measure "
            f"bits_per_dim, or train with {MIN_TIMESTEPS} or more"
        )


def _time(schedule: Schedule, kind: PredictionKind) -> tuple[Tensor, Tensor]:
    """Return the ODE's variable at each timestep, and the derivative of phi by it, float64 [T]."""
    alphas, sigmas = schedule.alphas, schedule.sigmas
    if kind == "eps":  # alpha > 0, since eps is refused at zero terminal SNR
        return (sigmas / alphas).log(), alphas * sigmas
    return (sigmas / (1 + alphas)).log(), sigmas


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
