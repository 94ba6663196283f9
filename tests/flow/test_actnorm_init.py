"""Actnorm initialization, and locating the layer that is not finite."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from small_flow import BOTH, GLOW, batch, flow, loss, objective
from torch import nn

from dgm.flow.bijections import ActNorm
from dgm.flow.coupling import NormedConv


def norms(net: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in net.named_modules() if isinstance(m, ActNorm | NormedConv)}


@pytest.mark.parametrize("name", BOTH)
@torch.no_grad()
def test_initialize_standardizes_every_actnorm_in_turn(name: str):
    made, net = objective(), flow(BOTH[name])  # couplings that are not the identity
    whole = batch(64)
    made.initialize({"flow": net}, *whole)
    outputs = {}

    def keep(path: str, output: Any) -> None:
        z = output[0] if isinstance(output, tuple) else output
        outputs[path] = z.clone()  # the ReLU that follows writes over it

    for path, layer in norms(net).items():
        layer.register_forward_hook(lambda _, __, output, path=path: keep(path, output))
    loss(made, net, whole)
    assert outputs.keys() == norms(net).keys() and len(outputs) >= 6
    for path, z in outputs.items():
        # Rounding of float32 through a dozen layers.
        assert z.mean((0, 2, 3)).abs().max() < 1e-3, path
        assert (z.var((0, 2, 3), correction=0) - 1).abs().max() < 1e-3, path


def test_initialize_does_not_depend_on_threads_or_change_the_random_state():
    made, first = objective(), flow()
    second = copy.deepcopy(first)
    threads = torch.get_num_threads()
    state = torch.get_rng_state()
    try:
        for net, count in ((first, 1), (second, 2)):
            torch.set_num_threads(count)
            made.initialize({"flow": net}, *batch(16))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), state)
    for (name, one), other in zip(first.named_parameters(), second.parameters(), strict=True):
        assert one.requires_grad and one.grad is None
        # Sums over pixels may be split differently; engines broadcast the first process's weights.
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, msg=name)


def test_initialize_changes_scales_and_biases_only_and_removes_its_hooks():
    made, net = objective(), flow()
    before = {name: p.clone() for name, p in net.named_parameters()}
    made.initialize({"flow": net}, *batch(16))
    weights = {name: p.clone() for name, p in net.named_parameters()}
    changed = {name.rsplit(".", 1)[1] for name, p in weights.items() if (p != before[name]).any()}
    assert changed == {"log_scale", "bias"}
    loss(made, net, batch(16, epoch=7))
    assert all(torch.equal(p, weights[name]) for name, p in net.named_parameters())


PLANTED = [
    ("levels.0.step0.actnorm", "log_scale", "levels.0.step0.actnorm (ActNorm)"),
    ("levels.0.step1.mix", "log_s", "levels.0.step1.mix (InvertibleConv)"),
    ("levels.0.step1.coupling.net.2", "weight", "levels.0.step1.coupling.net.2 (NormedConv)"),
    ("levels.1.prior", "bias", "levels.1.prior (ActNorm)"),
]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("path, weight, expected", PLANTED)
@torch.no_grad()
def test_the_first_layer_that_is_not_finite_is_named(
    path: str, weight: str, expected: str, value: float
):
    made, net = objective(), flow()
    for where, what in ((path, weight), ("levels.1.prior", "bias")):  # and in the last layer
        net.get_submodule(where).get_parameter(what).view(-1)[0] = value
    assert made.find_non_finite({"flow": net}, *batch(4)) == expected
    assert not math.isfinite(float(loss(made, net, batch(4))["loss"]))


@pytest.mark.parametrize("name", BOTH)
def test_no_layer_is_named_where_all_are_finite(name: str):
    made, net = objective(), flow(BOTH[name])
    assert made.find_non_finite({"flow": net}, *batch(4)) is None
    assert not any(module._forward_hooks for module in net.modules())


@torch.no_grad()
def test_a_density_that_overflows_is_named_where_every_layer_is_finite():
    made, net = objective(), flow(GLOW)
    net.get_submodule("levels.1.prior").get_parameter("bias").fill_(1e30)
    found = made.find_non_finite({"flow": net}, *batch(4))
    assert found is not None and "density of z" in found and "1e+30" in found
