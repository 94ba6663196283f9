"""The probability-flow ODE's density against a normal's, whose score is known."""

from __future__ import annotations

import math

import pytest
import torch
from small_diffusion import batch, objective, part_of, unet
from torch import Tensor
from torch.distributions import Normal

from dgm.diffusion.ode import ode_log_density, ode_nats, path
from dgm.diffusion.prediction import Denoised
from dgm.diffusion.samplers import Denoiser
from dgm.diffusion.schedule import Schedule, make_schedule
from dgm.rng import Draws


def normal_data(schedule: Schedule) -> tuple[Normal, Denoiser]:
    """Give a normal of images and the denoiser that knows it: E[x_0 | x_t], in closed form."""
    torch.manual_seed(0)
    mean = torch.randn(3, 2, 2, dtype=torch.float64) * 0.3
    spread = torch.rand(3, 2, 2, dtype=torch.float64) * 0.5 + 0.02

    def denoise(x: Tensor, t: int) -> Denoised:
        alpha, sigma = float(schedule.alphas[t]), float(schedule.sigmas[t])
        gain = alpha * spread**2 / (alpha**2 * spread**2 + sigma**2)
        x_0 = mean + gain * (x - alpha * mean)
        return Denoised(x_0, (x - alpha * x_0) / sigma)

    return Normal(mean, spread), denoise


@pytest.mark.parametrize(
    "kind, zero_terminal_snr", [("linear", False), ("cosine", False), ("linear", True)]
)
def test_density_of_a_normal_is_the_known_one(kind: str, zero_terminal_snr: bool):
    schedule = make_schedule(kind, 1000, zero_terminal_snr)
    data, denoise = normal_data(schedule)
    alpha, sigma = schedule.alphas[0], schedule.sigmas[0]
    first = Normal(alpha * data.mean, ((alpha * data.stddev) ** 2 + sigma**2).sqrt())
    x = data.sample((4,))
    expected = first.log_prob(x).flatten(1).sum(1)
    errors = []
    for steps in (25, 50, 100):
        found = ode_log_density(denoise, x, schedule, steps, draws=None)
        errors.append(float((found - expected).abs().max()) / (12 * math.log(2)))
    assert errors[0] > 2 * errors[1] > 4 * errors[2]  # a rule of second order
    assert errors[2] < 0.003  # bits per dimension, as the README says


def test_probe_finds_the_divergence_on_average():
    made, net = objective(), unet()
    given, _ = batch(1)
    denoiser = made.denoiser(net, given.labels, clip=False)
    x = given.images.permute(0, 3, 1, 2).double() / 127.5 - 1
    exact = ode_log_density(denoiser, x, made.schedule, 3, draws=None)
    many = 100
    copies, index = x.expand(many, -1, -1, -1), torch.arange(many)
    labels = given.labels.expand(many)
    estimates = ode_log_density(
        made.denoiser(net, labels, clip=False), copies, made.schedule, 3, Draws.of(0, index)
    )
    error = float(estimates.std()) / math.sqrt(many)
    assert error > 0 and float(estimates.mean()) == pytest.approx(float(exact), abs=4 * error)


def test_nats_of_an_image_do_not_depend_on_the_others():
    made, net = objective(), unet()
    whole, draws = batch(3)
    nats = ode_nats(made, {"net": net}, whole, draws, steps=4)
    assert nats.shape == (3,) and nats.isfinite().all() and not nats.requires_grad
    alone = ode_nats(made, {"net": net}, *part_of(whole, 1, 2), steps=4)
    torch.testing.assert_close(alone[0], nats[1], rtol=1e-9, atol=0)  # rounding


def test_path_goes_from_the_first_timestep_to_the_last():
    for total in (2, 10, 1000):
        schedule = make_schedule("cosine", total)
        for steps in (1, 5, 100, 5000):
            chosen = path(schedule, steps)
            assert chosen[0] == 0 and chosen[-1] == total - 1 and len(chosen) <= steps + 1
            assert chosen == sorted(set(chosen))
