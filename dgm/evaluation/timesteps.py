"""What a diffusion model knows of stored images, by timestep, and by its probability-flow ODE."""

from __future__ import annotations

import itertools
import math
import warnings
from typing import Any

import torch
from torch import Tensor

from dgm.diffusion import likelihood
from dgm.diffusion.objective import DiffusionObjective
from dgm.diffusion.ode import OdeNats, discretization_error, ode_nats, path
from dgm.evaluation.likelihood import as_bits, over_images, standard_error
from dgm.objective import Batch, Nets
from dgm.rng import Draws
from dgm.training.device_loader import Images
from dgm.training.engine import Engine

QUARTILES = 4
STRATA = 20  # timesteps that each image is noised to, one of each twentieth of them
_FIRST_STEPS = 16  # of the ODE, where the error decides
_PILOT = 8  # images that it is tried on


def bound_by_timestep(
    engine: Engine,
    objective: DiffusionObjective,
    nets: Nets,
    data: Images,
    index: Tensor,
    seed: int,
    batch: int = 100,
) -> dict[str, Any]:
    """Measure the variational bound as `bits_per_dim` does, and its terms by timestep.

    `bound_by_quartile` adds them up over each quarter of the timesteps, L_0 in the first;
    `bound_by_timestep` lists L_0 to L_{T-1}. Bits per dimension.
    """  # fmt: skip

    def terms(given: Batch, draws: Draws) -> Tensor:
        nats = objective.nats_by_timestep(nets, given, draws)
        prior = likelihood.prior_kl(
            objective.schedule, objective.pixels.scale(given.images, objective.dtype)
        )
        return torch.cat([nats, prior[:, None]], dim=1).double() * as_bits(given)

    found = over_images(engine, data, index, seed, terms, batch)
    mean, total = found.mean(0), objective.schedule.num_timesteps
    return {
        "bound": float(mean.sum()),
        "error": standard_error(found.sum(1)),
        "decoder": float(mean[0]),
        "steps": float(mean[1:-1].sum()),
        "prior": float(mean[-1]),
        "bound_by_quartile": {
            name: float(mean[rows].sum()) for name, rows in quartiles(total).items()
        },
        "bound_by_timestep": [round(value, 6) for value in mean[:-1].tolist()],
    }


def loss_by_timestep(
    engine: Engine,
    objective: DiffusionObjective,
    nets: Nets,
    data: Images,
    index: Tensor,
    seed: int,
    batch: int = 100,
) -> dict[str, Any]:
    """Measure the loss on stored images, on average and by quarter of the timesteps.

    loss: what the training minimises (without the bound's share where a variance is learned), of
    images as they are, told their class; eps_mse: the squared error of eps, which compares whatever
    the net predicts. Each image is noised to STRATA timesteps, one drawn from each of as many equal
    parts, so that the mean over them is that over all timesteps, on average.
    """  # fmt: skip
    total = objective.schedule.num_timesteps
    strata = min(STRATA, total)

    def measure(given: Batch, draws: Draws) -> Tensor:
        parts = []
        for stratum in range(strata):
            own = draws.at(stratum)
            place = (stratum + own.uniform("stratum", (1,), torch.float64)[:, 0]) / strata
            t = (place * total).long().clamp(max=total - 1)
            loss, eps = objective.errors_at(nets, given, t, own)
            parts.append(torch.stack([t.double(), loss.double(), eps.double()], dim=1))
        return torch.stack(parts, dim=1)

    found = over_images(engine, data, index, seed, measure, batch)
    t, loss, eps = found.flatten(0, 1).unbind(1)
    named: dict[str, Any] = {"timesteps_per_image": strata}
    for name, values in (("loss", loss), ("eps_mse", eps)):
        of_image = values.reshape(len(found), strata).mean(1)
        named |= {name: float(of_image.mean()), f"{name}_error": standard_error(of_image)}
    for name, values in (("loss", loss), ("eps_mse", eps)):
        named[f"{name}_by_quartile"] = {
            quarter: float(values[(t >= rows.start) & (t < rows.stop)].mean())
            for quarter, rows in quartiles(total).items()
        }
    return named


def bits_by_ode(
    engine: Engine,
    objective: DiffusionObjective,
    nets: Nets,
    data: Images,
    index: Tensor,
    seed: int,
    steps: int | None = None,
    tolerance: float = 0.01,
    batch: int = 50,
) -> dict[str, Any]:
    """Measure bits per dimension of stored images by the ODE's density, as `ode_nats` does.

    `steps` is the number of Heun steps; None doubles it until the estimated discretisation error
    is at most `tolerance` bits per dimension or the schedule has no more timesteps. Return `bound`,
    the mean over images, its standard error `error`, `discretization_error`, and `steps`. Warn if
    `discretization_error` exceeds `tolerance`. Collective: call on all ranks.
    """

    def measure(rows: Tensor, steps: int) -> Tensor:
        def bits(given: Batch, draws: Draws) -> Tensor:
            found = ode_nats(objective, nets, given, draws, steps)
            return torch.stack(list(found), dim=1) * as_bits(given)

        return over_images(engine, data, rows, seed, bits, batch)

    def taken(steps: int) -> int:
        return len(path(objective.schedule, steps, objective.config.prediction)) - 1

    count, most = taken(steps or _FIRST_STEPS), taken(objective.schedule.num_timesteps)
    if steps is None:  # a few images tell how many steps all of them need
        while _left(measure(index[:_PILOT], count)) > tolerance and count < most:
            count = taken(2 * count)
    found = measure(index, count)
    while steps is None and _left(found) > tolerance and count < most:
        count = taken(2 * count)
        found = measure(index, count)
    if not _left(found) <= tolerance:
        remedy = (
            f"the schedule has only {most}: measure bits_per_dim instead"
            if count == most
            else "raise --ode_steps, or omit it to double the steps until --ode_tolerance is met"
        )
        warnings.warn(
            f"bits_per_dim_ode has an estimated discretisation error of {_left(found):.2g} bits "
            f"per dimension after {count} steps, above the tolerance {tolerance:g}: {remedy}",
            stacklevel=2,
        )
    return {
        "bound": float(found[:, 0].mean()),
        "error": standard_error(found[:, 0]),
        "discretization_error": _left(found),
        "steps": count,
    }


def _left(found: Tensor) -> float:
    """Return the estimated discretisation error of the mean."""
    return discretization_error(OdeNats(*found.unbind(1)))


def quartiles(total: int) -> dict[str, slice]:
    """Name the quarters of the timesteps 0 to `total` - 1: `t 0 to 249` and so on."""
    ends = [math.ceil(total * k / QUARTILES) for k in range(QUARTILES + 1)]
    return {
        f"t {first} to {end - 1}": slice(first, end)
        for first, end in itertools.pairwise(ends)
        if end > first
    }
