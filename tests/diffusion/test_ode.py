"""The ODE's density as a measure: probes, batches, paths; its value: tests/references."""

from __future__ import annotations

import math

import pytest
import torch
from small_diffusion import batch, objective, part_of, unet

from dgm.common.errors import UserError
from dgm.diffusion.ode import ode_log_density, ode_nats, path
from dgm.diffusion.schedule import make_schedule
from dgm.rng import Draws


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


def test_nats_of_an_image_do_not_depend_on_the_others():
    made, net = objective(), unet()
    whole, draws = batch(3)
    found = ode_nats(made, {"net": net}, whole, draws, steps=8)
    alone = ode_nats(made, {"net": net}, *part_of(whole, 1, 2), steps=8)
    for values, own in zip(found, alone, strict=True):
        assert values.shape == (3,) and values.isfinite().all() and not values.requires_grad
        torch.testing.assert_close(own[0], values[1], rtol=1e-7, atol=1e-7)  # rounding


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


def test_too_few_steps_or_timesteps_are_refused():
    with pytest.raises(UserError, match="ode_steps is 7: give 8 or more"):
        path(make_schedule("linear", 1000), 7)
    with pytest.raises(UserError, match=r"diffusion\.num_timesteps is 32, too few"):
        path(make_schedule("linear", 32), 8)
