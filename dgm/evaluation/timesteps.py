"""Loss and likelihood of a diffusion model, by timestep and by its probability-flow ODE."""

from __future__ import annotations

import itertools
import math
import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dgm.diffusion import likelihood
from dgm.diffusion.objective import DiffusionObjective
from dgm.diffusion.ode import OdeNats, discretization_error, ode_nats, path
from dgm.evaluation.likelihood import ImageSubset, bits_per_nat, standard_error
from dgm.objective import Batch, Nets
from dgm.rng import Draws

QUARTILES = 4
STRATA = 20  # timesteps that each image is noised to, one in each twentieth of the schedule
_INITIAL_STEPS = 16  # ODE steps to begin with, doubled until the error is small
_PILOT_IMAGES = 8  # images by which the number of steps is chosen


def bound_by_timestep(
    objective: DiffusionObjective, nets: Nets, images: ImageSubset
) -> dict[str, Any]:
    """Return the variational bound as `bits_per_dim` does, and its terms by timestep.

    `bound_by_quartile` sums them over each quarter of the timesteps, L_0 in the first;
    `bound_by_timestep` lists L_0 to L_{T-1}. Bits per dimension. Collective: call on all ranks.
    """

    def terms(batch: Batch, draws: Draws) -> Tensor:
        nats = objective.nats_by_timestep(nets, batch, draws)
        x_0 = objective.pixels.scale(batch.images, objective.dtype)
        prior = likelihood.prior_kl(objective.schedule, x_0)
        return torch.cat([nats, prior[:, None]], dim=1).double() * bits_per_nat(batch)

    bits = images.map(terms)
    mean, total = bits.mean(0), objective.schedule.num_timesteps
    return {
        "bound": float(mean.sum()),
        "error": standard_error(bits.sum(1)),
        "decoder": float(mean[0]),
        "steps": float(mean[1:-1].sum()),
        "prior": float(mean[-1]),
        "bound_by_quartile": {
            name: float(mean[rows].sum()) for name, rows in quartiles(total).items()
        },
        "bound_by_timestep": [round(value, 6) for value in mean[:-1].tolist()],
    }


def loss_by_timestep(
    objective: DiffusionObjective, nets: Nets, images: ImageSubset
) -> dict[str, Any]:
    """Return the loss on stored images, on average and by quarter of the timesteps.

    loss: the training loss (without the term for a learned variance) of unaugmented images with
    their labels; eps_mse: the squared error of eps, comparable whatever the net predicts. Each
    image is noised to STRATA timesteps, one drawn from each of STRATA equal parts, so that their
    mean is an unbiased estimate of the mean over all timesteps. Collective: call on all ranks.
    """
    total = objective.schedule.num_timesteps
    strata = min(STRATA, total)

    def errors(batch: Batch, draws: Draws) -> Tensor:
        parts = []
        for stratum in range(strata):
            own = draws.at(stratum)
            time = (stratum + own.uniform("stratum", (1,), torch.float64)[:, 0]) / strata
            t = (time * total).long().clamp(max=total - 1)
            loss, eps = objective.errors_at(nets, batch, t, own)
            parts.append(torch.stack([t.double(), loss.double(), eps.double()], dim=1))
        return torch.stack(parts, dim=1)

    t, *errors_of = images.map(errors).unbind(2)
    metrics: dict[str, Any] = {"timesteps_per_image": strata}
    for name, values in zip(("loss", "eps_mse"), errors_of, strict=True):
        of_image = values.mean(1)
        metrics |= {name: float(of_image.mean()), f"{name}_error": standard_error(of_image)}
        metrics[f"{name}_by_quartile"] = {
            quarter: float(values[(t >= rows.start) & (t < rows.stop)].mean())
            for quarter, rows in quartiles(total).items()
        }
    return metrics


def bits_by_ode(
    objective: DiffusionObjective,
    nets: Nets,
    images: ImageSubset,
    steps: int | None = None,
    tolerance: float = 0.01,
) -> dict[str, Any]:
    """Return bits per dimension of stored images by the ODE's density, as `ode_nats` does.

    `steps` is the number of Heun steps; None doubles it until the estimated discretization error
    is at most `tolerance` bits per dimension or the schedule has no more timesteps. Return `bound`,
    the mean over images, its standard error `error`, `discretization_error`, and `steps`. Warn if
    `discretization_error` exceeds `tolerance`. Collective: call on all ranks.
    """

    def integrate(images: ImageSubset, steps: int) -> tuple[OdeNats, float]:
        """Return bits per dimension, and the estimated discretization error of their mean."""

        def bits(batch: Batch, draws: Draws) -> Tensor:
            nats = ode_nats(objective, nets, batch, draws, steps)
            return torch.stack(list(nats), dim=1) * bits_per_nat(batch)

        found = OdeNats(*images.map(bits).unbind(1))
        return found, discretization_error(found)

    def num_steps(steps: int) -> int:
        return len(path(objective.schedule, steps, objective.config.prediction)) - 1

    count = num_steps(steps or _INITIAL_STEPS)
    max_steps = num_steps(objective.schedule.num_timesteps)
    pilot = replace(images, index=images.index[:_PILOT_IMAGES])
    for subset in (pilot, images) if steps is None else (images,):
        found, left = integrate(subset, count)
        while steps is None and left > tolerance and count < max_steps:
            count = num_steps(2 * count)
            found, left = integrate(subset, count)
    if not left <= tolerance:
        remedy = (
            f"the schedule has only {max_steps}: use bits_per_dim instead"
            if count == max_steps
            else "raise --ode_steps, or omit it to double the steps until --ode_tolerance is met"
        )
        warnings.warn(
            f"bits_per_dim_ode has an estimated discretization error of {left:.2g} bits "
            f"per dimension after {count} steps, above the tolerance {tolerance:g}: {remedy}",
            stacklevel=2,
        )
    return {
        "bound": float(found[0].mean()),
        "error": standard_error(found[0]),
        "discretization_error": left,
        "steps": count,
    }


def quartiles(total: int) -> dict[str, slice]:
    """Return the quarters of the timesteps 0 to `total` - 1 by name: `t 0 to 249` and so on."""
    ends = [math.ceil(total * k / QUARTILES) for k in range(QUARTILES + 1)]
    return {
        f"t {first} to {end - 1}": slice(first, end)
        for first, end in itertools.pairwise(ends)
        if end > first
    }
