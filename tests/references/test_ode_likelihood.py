"""The probability-flow ODE's density against closed forms.

Song et al. 2021, "Score-based generative modeling through stochastic differential equations",
equation 39. The denoiser E[x_0 | x_t] of a normal and of a mixture of normals is known, and so is
the density at every noise level: from N(m, s^2) comes N(alpha m, alpha^2 s^2 + sigma^2).
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from dgm.diffusion.ode import OdeNats, ode_log_density, path
from dgm.diffusion.prediction import Denoised
from dgm.diffusion.samplers import Denoiser
from dgm.diffusion.schedule import Schedule, make_schedule

SHAPE = (3, 2, 2)
BITS = 12 * math.log(2)
SCHEDULES = [("linear", False), ("cosine", False), ("linear", True)]


def mixture(components: int, spread: float) -> tuple[Tensor, Tensor]:
    """Return means and standard deviations, each [K, C, H, W], of equally likely components."""
    torch.manual_seed(components)
    means = 0.4 * torch.randn(components, *SHAPE, dtype=torch.float64)
    return means, spread * (0.2 + torch.rand(components, *SHAPE, dtype=torch.float64))


def at_level(data: tuple[Tensor, Tensor], alpha: float, sigma: float) -> MixtureSameFamily:
    means, spreads = data
    noised = Normal(alpha * means, ((alpha * spreads) ** 2 + sigma**2).sqrt())
    weights = Categorical(torch.ones(len(means), dtype=torch.float64))
    return MixtureSameFamily(weights, Independent(noised, 3))


def denoiser_of(data: tuple[Tensor, Tensor], schedule: Schedule) -> Denoiser:
    """Return E[x_0 | x_t]: each component's, weighed by its posterior probability."""
    means, spreads = data

    def denoise(x: Tensor, t: int) -> Denoised:
        alpha, sigma = float(schedule.alphas[t]), float(schedule.sigmas[t])
        noised = at_level(data, alpha, sigma)
        weight = noised.component_distribution.log_prob(x[:, None]).softmax(1)
        gain = alpha * spreads**2 / (alpha**2 * spreads**2 + sigma**2)
        each = means + gain * (x[:, None] - alpha * means)
        x_0 = (weight[:, :, None, None, None] * each).sum(1)
        return Denoised(x_0, (x - alpha * x_0) / sigma)

    return denoise


def estimate(denoise: Denoiser, x: Tensor, schedule: Schedule, steps: int) -> OdeNats:
    """Return minus the extrapolated log-density, and the error that is left."""
    fine = path(schedule, steps)
    quarter, half, whole = (
        ode_log_density(denoise, x, schedule, fine[::stride], None) for stride in (4, 2, 1)
    )
    better, worse = whole + (whole - half) / 3, half + (half - quarter) / 3
    return OdeNats(-better, worse - better)


@pytest.mark.parametrize("kind, zero_terminal_snr", SCHEDULES)
@pytest.mark.parametrize("components, spread", [(1, 0.5), (1, 0.05), (3, 0.3)])
def test_density_is_the_known_one(
    kind: str, zero_terminal_snr: bool, components: int, spread: float
) -> None:
    schedule, data = make_schedule(kind, 1000, zero_terminal_snr), mixture(components, spread)
    x = at_level(data, 1, 0).sample((6,))
    expected = at_level(data, float(schedule.alphas[0]), float(schedule.sigmas[0])).log_prob(x)
    denoise = denoiser_of(data, schedule)
    # What is left of the signal at the last timestep of the linear schedule counts as noise.
    end = 0.002 if kind == "linear" and not zero_terminal_snr else 0.0
    for steps, bound in ((12, 0.1), (16, 0.05), (32, 0.006), (64, 0.0015)):
        found = estimate(denoise, x, schedule, steps)
        off = (-found.nats - expected) / BITS
        assert float(off.mean().abs()) < bound + end, steps
        # The error that is reported is not smaller than the true one, but for the timesteps' grid.
        said = float(found.discretization_error.mean().abs()) / BITS
        assert float(off.mean().abs()) < said + 0.0015 + end, steps


@pytest.mark.parametrize("kind, zero_terminal_snr", SCHEDULES)
def test_heuns_rule_is_of_second_order_before_it_is_extrapolated(
    kind: str, zero_terminal_snr: bool
) -> None:
    schedule, data = make_schedule(kind, 4000, zero_terminal_snr), mixture(1, 0.3)
    x, denoise = at_level(data, 1, 0).sample((4,)), denoiser_of(data, schedule)
    values = {
        steps: ode_log_density(denoise, x, schedule, path(schedule, steps), None)
        for steps in (16, 32, 64, 1024)
    }
    errors = [float((values[n] - values[1024]).mean().abs()) for n in (16, 32, 64)]
    assert 3.3 < errors[0] / errors[1] < 5 and 3.3 < errors[1] / errors[2] < 5, errors
