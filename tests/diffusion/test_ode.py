"""The ODE's density as a measure: probes, batches, paths; its value: tests/references."""

from __future__ import annotations

import math

import pytest
import torch
from small_diffusion import batch, objective, part_of, unet

from dgm.diffusion.ode import ode_log_density, ode_nats, path
from dgm.diffusion.schedule import make_schedule
from dgm.errors import UserError
from dgm.rng import Draws


def test_probe_finds_the_divergence_on_average():
    made, net = objective(), unet()
    given, _ = batch(1)
    denoiser = made.denoiser(net, given.labels, clip=False)
    x, chosen = made.pixels.scale(given.images, torch.float64), path(made.schedule, 4)
    exact = ode_log_density(denoiser, x, made.schedule, chosen, draws=None)
    many = 100
    copies, index = x.expand(many, -1, -1, -1), torch.arange(many)
    labels = given.labels.expand(many)
    estimates = ode_log_density(
        made.denoiser(net, labels, clip=False), copies, made.schedule, chosen, Draws.of(0, index)
    )
    error = float(estimates.std()) / math.sqrt(many)
    assert error > 0 and float(estimates.mean()) == pytest.approx(float(exact), abs=4 * error)


def test_nats_of_an_image_do_not_depend_on_the_others():
    made, net = objective(), unet()
    whole, draws = batch(3)
    found = ode_nats(made, {"net": net}, whole, draws, steps=4)
    alone = ode_nats(made, {"net": net}, *part_of(whole, 1, 2), steps=4)
    for values, own in zip(found, alone, strict=True):
        assert values.shape == (3,) and values.isfinite().all() and not values.requires_grad
        torch.testing.assert_close(own[0], values[1], rtol=1e-7, atol=1e-7)  # rounding


@pytest.mark.parametrize("total", [5, 10, 1000])
@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_path_goes_from_the_first_timestep_to_the_last(kind: str, total: int):
    for steps in (4, 5, 100, 5000):
        chosen = path(make_schedule(kind, total), steps)
        assert chosen[0] == 0 and chosen[-1] == total - 1 and (len(chosen) - 1) % 4 == 0
        assert chosen == sorted(set(chosen))
        assert len(chosen) > steps or len(chosen) > 0.4 * total


def test_too_few_steps_or_timesteps_are_refused():
    with pytest.raises(UserError, match="takes 4 steps or more, not 3"):
        path(make_schedule("linear", 1000), 3)
    with pytest.raises(UserError, match=r"diffusion\.num_timesteps is 4, too few"):
        path(make_schedule("linear", 4), 8)
