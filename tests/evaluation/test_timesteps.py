"""Metrics by timestep add up to those over all timesteps."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from array_images import ArrayImages
from small_diffusion import SMALL, batch, objective, unet
from torch import Tensor, nn

from dgm.evaluation import timesteps
from dgm.evaluation.likelihood import ImageSubset, bits_per_dim
from dgm.evaluation.timesteps import bits_by_ode, bound_by_timestep, loss_by_timestep, quartiles
from dgm.rng import Draws
from dgm.training.engine import Engine

TEN = replace(SMALL, num_timesteps=10)
LONG = replace(TEN, num_timesteps=1000, schedule="cosine", prediction="v")
INDEX = torch.tensor([4, 0, 3])


def stored() -> ArrayImages:
    images = batch(5)[0]
    return ArrayImages(images.images.numpy(), images.labels.numpy())


def test_terms_by_timestep_add_up_to_the_bound(engine: Engine):
    made, nets, data = objective(TEN), {"net": unet()}, stored()
    whole = bits_per_dim(made, nets, ImageSubset(engine, data, INDEX, 0))
    found = bound_by_timestep(made, nets, ImageSubset(engine, data, INDEX, 0, batch=2))
    for name in ("bound", "error", "decoder", "steps", "prior"):
        assert found[name] == pytest.approx(whole[name], rel=1e-9), name
    assert len(found["bound_by_timestep"]) == 10
    assert found["bound_by_timestep"][0] == pytest.approx(found["decoder"], abs=1e-6)
    quarters = found["bound_by_quartile"]
    assert list(quarters) == ["t 0 to 2", "t 3 to 4", "t 5 to 7", "t 8 to 9"]
    assert sum(quarters.values()) + found["prior"] == pytest.approx(found["bound"])
    assert quarters["t 3 to 4"] == pytest.approx(sum(found["bound_by_timestep"][3:5]), abs=1e-5)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_loss_is_that_of_training_at_those_timesteps(engine: Engine, prediction: str):
    config = replace(TEN, prediction=prediction, weighting="min_snr")
    made, nets, data = objective(config), {"net": unet()}, stored()
    found = loss_by_timestep(made, nets, ImageSubset(engine, data, INDEX, 0))
    # Ten timesteps, as many strata: each image meets every timestep once.
    assert found["timesteps_per_image"] == 10
    x_0 = torch.from_numpy(data.images(INDEX.numpy())).permute(0, 3, 1, 2).double() / 127.5 - 1
    labels, losses, squares = INDEX % 5, [], []
    for t in range(10):
        draws = Draws.of(0, INDEX, t)
        eps = draws.normal("noise", (8, 8, 3), torch.float64).permute(0, 3, 1, 2)
        alpha, sigma = made.schedule.alphas[t], made.schedule.sigmas[t]
        with torch.no_grad():
            output = nets["net"](alpha * x_0 + sigma * eps, torch.full((3,), t), labels)
        snr = float(made.schedule.snr[t])
        if prediction == "eps":
            weight, target, eps_hat = min(snr, 5.0) / snr, eps, output
        else:
            weight, target = min(snr, 5.0) / (snr + 1), alpha * eps - sigma * x_0
            eps_hat = sigma * (alpha * x_0 + sigma * eps) + alpha * output
        losses.append(weight * float((output - target).square().mean()))
        squares.append(float((eps_hat - eps).square().mean()))
    assert found["loss"] == pytest.approx(np.mean(losses))
    assert found["eps_mse"] == pytest.approx(np.mean(squares))
    assert found["loss_by_quartile"]["t 5 to 7"] == pytest.approx(np.mean(losses[5:8]))
    assert found["eps_mse_by_quartile"]["t 0 to 2"] == pytest.approx(np.mean(squares[:3]))


def test_timesteps_are_drawn_evenly(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(timesteps, "STRATA", 4)
    made = objective(replace(SMALL, num_timesteps=50))
    seen: list[torch.Tensor] = []
    plain = made.errors_at

    def spy(nets, given, t, draws):
        seen.append(t)
        return plain(nets, given, t, draws)

    monkeypatch.setattr(made, "errors_at", spy)
    loss_by_timestep(made, {"net": unet()}, ImageSubset(engine, stored(), torch.arange(5), 3))
    for stratum, t in enumerate(seen):
        assert ((t >= stratum * 12.5 - 1) & (t < (stratum + 1) * 12.5)).all()
    assert len({int(t) for own in seen for t in own}) > 10


def test_bits_by_ode_are_nats_over_dimensions(engine: Engine):
    made, nets, data = objective(LONG), {"net": unet(LONG)}, stored()
    found = bits_by_ode(made, nets, ImageSubset(engine, data, INDEX, 0), steps=8, tolerance=100)
    one_by_one = ImageSubset(engine, data, INDEX, 0, batch=1)
    again = bits_by_ode(made, nets, one_by_one, steps=8, tolerance=100)
    assert found["bound"] == pytest.approx(again["bound"], rel=1e-9)
    assert math.isfinite(found["bound"]) and found["error"] > 0 and found["steps"] == 8


class NarrowNormal(nn.Module):
    """E[x_0 | x_t] of images from N(0, 0.3^2): its ODE takes more than a few steps."""

    def forward(self, x: Tensor, t: Tensor, *_: object) -> Tensor:
        alpha2 = objective(LONG).schedule.alphas_cumprod[t][:, None, None, None]
        return alpha2.sqrt() * 0.3**2 / (alpha2 * 0.3**2 + 1 - alpha2) * x


def test_steps_of_the_ode_double_until_the_error_is_small(engine: Engine):
    made = objective(replace(LONG, prediction="x_0", class_conditional=False))
    nets, data = {"net": NarrowNormal()}, stored()
    steps, errors = [], []
    for tolerance in (1.0, 0.05, 0.002):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = bits_by_ode(
                made, nets, ImageSubset(engine, data, INDEX, 0), tolerance=tolerance
            )
        assert found["discretization_error"] <= tolerance
        steps.append(found["steps"])
        errors.append(found["discretization_error"])
        given = bits_by_ode(
            made, nets, ImageSubset(engine, data, INDEX, 0), found["steps"], tolerance
        )
        assert given == found
    assert steps[0] == 16 and steps == sorted(steps) and steps[2] > 16, (steps, errors)


def test_warns_if_the_discretization_error_exceeds_the_tolerance(engine: Engine):
    made, nets, data = objective(LONG), {"net": unet(LONG)}, stored()
    message = r"error of \S+ bits per dimension after 8 steps, above the tolerance 1e-05: raise"
    with pytest.warns(UserWarning, match=message):
        found = bits_by_ode(
            made, nets, ImageSubset(engine, data, INDEX, 0), steps=8, tolerance=1e-5
        )
    assert found["discretization_error"] > 1e-5
    short = objective(replace(LONG, num_timesteps=33))
    with pytest.warns(UserWarning, match="the schedule has only 32"):
        bits_by_ode(short, {"net": unet(LONG)}, ImageSubset(engine, data, INDEX, 0), tolerance=1e-9)


def test_quartiles_contain_every_timestep_once():
    for total in (2, 3, 4, 10, 1000):
        rows = [k for part in quartiles(total).values() for k in range(total)[part]]
        assert rows == list(range(total))
