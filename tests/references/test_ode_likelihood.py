"""The probability-flow ODE's density against closed forms.

Song et al. 2021, "Score-based generative modeling through stochastic differential equations",
equation 39. The denoiser E[x_0 | x_t] of a normal and of a mixture of normals is known, and so is
the density at every noise level: from N(m, s^2) comes N(alpha m, alpha^2 s^2 + sigma^2).
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from array_images import ArrayImages
from scipy.integrate import solve_ivp
from small_diffusion import batch, objective, unet
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from dgm.common.errors import UserError
from dgm.diffusion.objective import DiffusionConfig, DiffusionObjective, DiffusionSampleConfig
from dgm.diffusion.ode import discretization_error, ode_log_density, ode_nats, path
from dgm.diffusion.parameterization import Denoised
from dgm.diffusion.samplers import Denoiser
from dgm.diffusion.schedule import Schedule, make_schedule
from dgm.evaluation.likelihood import ImageSubset
from dgm.evaluation.timesteps import bits_by_ode
from dgm.objective import Batch
from dgm.preprocessing import PixelMap
from dgm.rng import Draws
from dgm.training.engine import Engine

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


MEAN, SPREAD = 0.3, 0.2  # of each pixel, for the nets below


class Pixelwise(nn.Module):
    """Prediction for pixels from N(MEAN, SPREAD^2), wrong by amp sin(3 x + 2 alpha).

    Pixels do not mix, so one Rademacher probe finds the divergence exactly.
    """

    def __init__(self, schedule: Schedule, kind: str, amp: float):
        super().__init__()
        self.schedule, self.kind, self.amp = schedule, kind, amp

    def forward(self, x: Tensor, t: Tensor, *_: object) -> Tensor:
        alpha, sigma = (
            level[t][:, None, None, None] for level in (self.schedule.alphas, self.schedule.sigmas)
        )
        eps = sigma * (x - alpha * MEAN) / (alpha**2 * SPREAD**2 + sigma**2)
        exact = eps if self.kind == "eps" else (eps - sigma * x) / alpha
        return exact + self.amp * torch.sin(3 * x + 2 * alpha)


def true_nats(x: np.ndarray, schedule: Schedule, kind: str, amp: float) -> np.ndarray:
    """Return -log p of each pixel by scipy's adaptive integrator, over phi."""

    def slope(phi: float, state: np.ndarray) -> np.ndarray:
        alpha, sigma = math.cos(phi), math.sin(phi)
        x, _ = state.reshape(2, -1)
        gain = sigma / (alpha**2 * SPREAD**2 + sigma**2)
        error, its_slope = amp * np.sin(3 * x + 2 * alpha), 3 * amp * np.cos(3 * x + 2 * alpha)
        if kind == "eps":
            error, its_slope = error / alpha, its_slope / alpha
        v = (gain * (x - alpha * MEAN) - sigma * x) / alpha + error
        return np.concatenate([v, (gain - sigma) / alpha + its_slope])

    first, last = (math.acos(float(schedule.alphas[t])) for t in (0, path(schedule, 8, kind)[-1]))
    start = np.concatenate([x.ravel(), np.zeros(x.size)])
    ended = solve_ivp(slope, (first, last), start, "DOP853", rtol=1e-9, atol=1e-10)
    x_end, gained = ended.y[:, -1].reshape(2, *x.shape)
    return 0.5 * (x_end**2 + math.log(2 * math.pi)) - gained


class Stored(ArrayImages):
    """Twelve stored images of such pixels, as a data set."""

    def __init__(self, pixels: PixelMap):
        torch.manual_seed(0)
        super().__init__(pixels.to_uint8(MEAN + SPREAD * torch.randn(12, 3, 4, 4)).numpy())


def objective_of(kind: str, schedule: str, dequantize: bool = False) -> DiffusionObjective:
    config = DiffusionConfig(
        schedule=schedule, prediction=kind, class_conditional=False, dequantize=dequantize
    )
    return DiffusionObjective(config, DiffusionSampleConfig(), (4, 4, 3), None, dtype=torch.float64)


@pytest.mark.parametrize("dequantize", [False, True])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("kind, amp", [("eps", 0.0), ("eps", 0.024), ("v", 0.0), ("v", 0.05)])
def test_bits_of_stored_images_are_those_of_an_adaptive_integrator(
    kind: str, amp: float, schedule: str, dequantize: bool, engine: Engine
) -> None:
    made = objective_of(kind, schedule, dequantize)
    data, index = Stored(made.pixels), torch.arange(12)
    width = 1 / 128 if dequantize else 2 / 255
    levels = data.pixels.astype(float).transpose(0, 3, 1, 2)
    lower = levels / 128 - 1 if dequantize else (levels - 0.5) / 127.5 - 1
    noise = Draws.of(3, index).uniform("dequantize", (4, 4, 3), torch.float64)
    x = lower + width * noise.permute(0, 3, 1, 2).numpy()
    nats = true_nats(x, made.schedule, kind, amp).sum((1, 2, 3)) - 48 * math.log(width)
    nets = {"net": Pixelwise(made.schedule, kind, amp)}
    found = ode_nats(
        made, nets, Batch(torch.from_numpy(data.pixels), torch.zeros(12).long()),
        Draws.of(3, index), steps=64,
    )  # fmt: skip
    # Tight enough to see the dequantizing noise, which moves an image by 0.002 bits per dimension.
    np.testing.assert_allclose(found.nats.numpy(), nats, rtol=0, atol=0.0015 * 48 * math.log(2))
    bits = bits_by_ode(made, nets, ImageSubset(engine, data, index, 3))
    off = bits["bound"] - nats.mean() / (48 * math.log(2))
    # The reported estimate covers the true error, up to the rounding of the path to timesteps.
    assert abs(off) < 0.01 and abs(off) < bits["discretization_error"] + 0.001
    assert bits["discretization_error"] <= 0.01


@pytest.mark.parametrize("kind", ["eps", "v"])
def test_estimated_discretization_error_is_not_below_the_true_one(kind: str) -> None:
    for schedule in ("linear", "cosine"):
        made = objective_of(kind, schedule)
        data, index = Stored(made.pixels), torch.arange(12)
        given = Batch(torch.from_numpy(data.pixels), torch.zeros(12).long())
        x = made.pixels.dequantize(given.images, Draws.of(3, index), torch.float64).numpy()
        for amp in (0.0, 0.01, 0.02, 0.03, 0.05):
            nets = {"net": Pixelwise(made.schedule, kind, amp)}
            true = true_nats(x, made.schedule, kind, amp).sum() / 12 - 48 * math.log(2 / 255)
            for steps in (8, 16, 24, 32, 48):
                found = ode_nats(made, nets, given, Draws.of(3, index), steps)
                off = abs(float(found.nats.mean()) - true) / (48 * math.log(2))
                estimated = discretization_error(found) / (48 * math.log(2))
                assert off < estimated + 0.002, (schedule, amp, steps)


@pytest.mark.slow
@pytest.mark.parametrize("kind, zero_terminal_snr", SCHEDULES)
@pytest.mark.parametrize("components, spread", [(1, 0.5), (1, 0.05), (3, 0.3)])
def test_density_is_the_known_one(
    kind: str, zero_terminal_snr: bool, components: int, spread: float
) -> None:
    schedule, data = make_schedule(kind, 1000, zero_terminal_snr), mixture(components, spread)
    x = at_level(data, 1, 0).sample((6,))
    expected = at_level(data, float(schedule.alphas[0]), float(schedule.sigmas[0])).log_prob(x)
    # The linear schedule leaves some signal at the last timestep, which counts as noise.
    end = 0.002 if kind == "linear" and not zero_terminal_snr else 0.0
    fine = path(schedule, 256)
    found = ode_log_density(denoiser_of(data, schedule), x, schedule, fine, None)
    off = (found - expected) / BITS
    # Mean of absolute errors per image; standard deviations go down to 0.05 * 0.2 = 0.01.
    assert float(off.abs().mean()) < 0.002 + end


@pytest.mark.slow
@pytest.mark.parametrize("kind, zero_terminal_snr", SCHEDULES)
def test_heuns_rule_is_of_second_order_before_it_is_extrapolated(
    kind: str, zero_terminal_snr: bool
) -> None:
    schedule, data = make_schedule(kind, 4000, zero_terminal_snr), mixture(1, 0.3)
    x, denoise = at_level(data, 1, 0).sample((4,)), denoiser_of(data, schedule)
    values = {
        steps: ode_log_density(denoise, x, schedule, path(schedule, steps), None)
        for steps in (16, 32, 64, 256)
    }
    errors = [float((values[n] - values[256]).mean().abs()) for n in (16, 32, 64)]
    assert 3.3 < errors[0] / errors[1] < 5 and 3.3 < errors[1] / errors[2] < 5, errors


@pytest.mark.slow
def test_probe_finds_the_divergence_on_average():
    made, net = objective(), unet()
    given, _ = batch(1)
    denoiser = made.denoiser(net, given.labels, clip=False)
    x, chosen = made.pixels.scale(given.images, torch.float64), path(made.schedule, 8)
    exact = ode_log_density(denoiser, x, made.schedule, chosen, draws=None)
    many = 100
    copies, index = x.expand(many, -1, -1, -1), torch.arange(many)
    labels = given.labels.expand(many)
    estimates = ode_log_density(
        made.denoiser(net, labels, clip=False), copies, made.schedule, chosen, Draws.of(0, index)
    )
    error = float(estimates.std()) / math.sqrt(many)
    assert error > 0 and float(estimates.mean()) == pytest.approx(float(exact), abs=4 * error)


@pytest.mark.parametrize("total", [33, 50, 1000])
@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("prediction", ["eps", "x_0", "v"])
def test_path_goes_from_the_first_timestep_to_the_last(prediction, kind: str, total: int):
    for steps in (8, 9, 100, 5000):
        schedule = make_schedule(kind, total)
        chosen = path(schedule, steps, prediction)
        last, snr = chosen[-1], schedule.snr
        if prediction == "eps":  # ends before the large gaps in lambda near pure noise
            assert snr[last] <= 1e-4 or (snr[last] <= 0.01 and snr[last] > 2 * snr[last + 1])
        else:
            assert last == total - 1
        assert chosen[0] == 0 and (len(chosen) - 1) % 8 == 0
        assert chosen == sorted(set(chosen))
        assert len(chosen) > min(steps, last // 8 * 8)


def test_too_few_timesteps_are_refused():
    with pytest.raises(UserError, match=r"diffusion\.num_timesteps is 32, too few"):
        path(make_schedule("linear", 32), 8)
