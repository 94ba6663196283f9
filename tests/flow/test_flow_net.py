"""The whole flows: inverses, log-determinants, densities and invalid sizes."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_flow import BOTH, GLOW, REALNVP, batch, flow, moved, objective, train
from torch import Tensor

from dgm.common.errors import UserError
from dgm.flow.bijections import ActNorm, Chain, InvertibleConv
from dgm.flow.coupling import Coupling, conv_net
from dgm.flow.networks import Flow, FlowNetConfig, normal_log_prob
from dgm.preprocessing import DEQUANTIZED


def images(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    whole, draws = batch(count)
    return DEQUANTIZED.dequantize(whole.images, draws, dtype)


@pytest.mark.parametrize("coupling, levels", [("affine", 2), ("affine", 3), ("additive", 2)])
@pytest.mark.parametrize("name", BOTH)
@torch.no_grad()
def test_inverse_undoes_forward(name: str, coupling: Any, levels: int):
    # Moved by 0.1, weights would cost more digits in L U of 48 channels than training does.
    net = flow(replace(BOTH[name], coupling=coupling, levels=levels), by=0.05)
    x = images(6)
    z, log_det = net(x)
    assert z.shape == (6, 8 * 8 * 3) and log_det.shape == (6,)
    # float32 has seven digits, and each of a dozen layers may magnify rounding.
    assert (net.inverse(z) - x).abs().max() < 1e-4
    assert (net(net.inverse(z))[0] - z).abs().max() < 1e-3


@pytest.mark.parametrize("name", BOTH)
def test_inverse_undoes_forward_after_training(name: str):
    made, net = objective(), flow(BOTH[name], by=0)
    made.initialize({"flow": net}, *batch(16))
    train(made, net, 20)
    with torch.no_grad():
        z, _ = net(images(6))
        assert (net.inverse(z) - images(6)).abs().max() < 1e-4


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("name", BOTH)
def test_log_det_is_that_of_the_jacobian(name: str, levels: int):
    config = replace(BOTH[name], levels=levels)
    net = flow(config, (4, 4, 2), torch.float64)
    x = torch.linspace(-0.9, 0.8, 32, dtype=torch.float64).reshape(1, 2, 4, 4)
    jacobian = torch.autograd.functional.jacobian(lambda i: net(i)[0], x).reshape(32, 32)
    expected = torch.linalg.slogdet(jacobian)[1]
    assert abs(float(net(x)[1].detach() - expected)) < 1e-9  # rounding of float64


def two_values(name: str) -> Any:
    """Return a flow of two values, [B, 1, 1, 2] or [B, 2, 1, 1], in float64."""
    if name == "glow":
        torch.manual_seed(0)
        steps = OrderedDict[str, torch.nn.Module]()
        for i in range(3):
            steps[f"actnorm{i}"], steps[f"mix{i}"] = ActNorm(2), InvertibleConv(2)
            steps[f"coupling{i}"] = Coupling(conv_net(1, 2, 8))
        return moved(Chain(steps), by=0.3).double()
    config = replace(REALNVP, levels=1, logit=0.05 if name == "logit" else 0.0)
    return flow(config, (1, 2, 1), torch.float64, by=0.2)


@pytest.mark.parametrize("name", ["glow", "realnvp", "logit"])
@torch.no_grad()
def test_density_integrates_to_one(name: str):
    net = two_values(name)
    # The logit's domain ends where its argument is 0 or 1; other densities vanish beyond 10.
    reach = 1 / 0.9 if name == "logit" else 10.0
    side = 300
    middles = (torch.arange(side, dtype=torch.float64) + 0.5) * (2 * reach / side) - reach
    points = torch.cartesian_prod(middles, middles)
    x = points[:, :, None, None] if name == "glow" else points[:, None, None, :]
    z, log_det = net(x)
    density = torch.exp(normal_log_prob(z.flatten(1)) + log_det)
    mass = float(density.sum()) * (2 * reach / side) ** 2
    assert abs(mass - 1) < 1e-3  # the midpoint rule on 300 x 300 points


@torch.no_grad()
def test_glow_begins_as_a_rotation():
    net, x = flow(GLOW, by=0), images(4)
    z, log_det = net(x)
    assert log_det.abs().max() < 1e-3  # rounding of log 1, some thousand times
    torch.testing.assert_close(z.square().sum(1), x.square().sum((1, 2, 3)), rtol=1e-5, atol=0)


@torch.no_grad()
def test_realnvp_begins_as_the_identity_on_the_logits():
    net, x = flow(REALNVP, by=0), images(4)
    z, _ = net(x)
    logits = torch.logit(x * 0.45 + 0.5).flatten(1)
    torch.testing.assert_close(z.sort(1).values, logits.sort(1).values)


def test_published_configuration_has_the_published_number_of_parameters():
    with torch.device("meta"):
        net = Flow(FlowNetConfig(), (32, 32, 3))
    assert round(sum(p.numel() for p in net.parameters()) / 1e6) == 44
    assert sum(h * w * c for h, w, c in net.shapes) == 32 * 32 * 3
    assert net.shapes == [(16, 16, 6), (8, 8, 12), (4, 4, 48)]


def test_height_and_width_are_both_checked():
    with pytest.raises(UserError, match=r"images of 8 x 6 cannot be halved 2 times"):
        Flow(GLOW, (8, 6, 3))
