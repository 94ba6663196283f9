"""The moving average of the weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dgm.training.ema import Ema

LATE = 10**9  # images seen at which the early ramp is long over


def filled(net: nn.Module, value: float) -> nn.Module:
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(value)
    return net


def weight_of(ema: Ema) -> float:
    values = torch.cat([p.flatten() for p in ema.nets["net"].parameters()])
    assert values.unique().numel() == 1
    return float(values[0])


@pytest.mark.parametrize("batch", [1, 8, 100, 200])
def test_the_contribution_of_a_weight_halves_in_the_halflife(batch: int):
    net = filled(nn.Linear(3, 2).double(), 1.0)
    ema = Ema({"net": net}, halflife_images=200)
    filled(net, 0.0)
    for seen in range(batch, 201, batch):
        ema.update({"net": net}, LATE + seen, batch)
    # Up to 200 products, each with a rounding error of 1.1e-16.
    assert weight_of(ema) == pytest.approx(0.5, rel=1e-12)


def test_early_in_a_run_the_halflife_is_a_fraction_of_the_images_seen():
    net = filled(nn.Linear(3, 2).double(), 1.0)
    ema = Ema({"net": net}, halflife_images=10_000)
    filled(net, 0.0)
    ema.update({"net": net}, 2000, 100)  # a halflife of 5 % of 2000: one batch
    assert weight_of(ema) == pytest.approx(0.5, rel=1e-12)
    ema.update({"net": net}, 10**6, 10_000)  # 5 % of a million exceed the configured halflife
    assert weight_of(ema) == pytest.approx(0.25, rel=1e-12)


@pytest.mark.parametrize("halflife, seen", [(0.0, LATE), (100.0, 0)])
def test_without_a_halflife_the_average_is_the_weights(halflife: float, seen: int):
    net = filled(nn.Linear(3, 2), 1.0)
    ema = Ema({"net": net}, halflife)
    filled(net, 3.0)
    ema.update({"net": net}, seen, 8)
    assert weight_of(ema) == 3.0


def test_statistics_are_averaged_like_weights_and_counts_are_copied(nets: dict[str, nn.Module]):
    ema = Ema(nets, halflife_images=8)
    norm = nets["other"][1]
    before = norm.running_var.clone()
    nets["other"](torch.randn(8, 3, 6, 6))
    ema.update(nets, LATE, 8)
    mine = ema.nets["other"][1]
    assert (norm.running_var != before).all()
    torch.testing.assert_close(mine.running_var, (before + norm.running_var) / 2)
    assert int(mine.num_batches_tracked) == 1
    assert mine.running_var.data_ptr() != norm.running_var.data_ptr()


def test_the_average_is_frozen_and_shares_no_memory(nets: dict[str, nn.Module]):
    ema = Ema(nets, halflife_images=1000)
    for name, net in nets.items():
        mine = ema.nets[name]
        assert not mine.training and net.training
        assert not any(p.requires_grad for p in mine.parameters())
        assert all(p.requires_grad for p in net.parameters())
    before = nets["net"].weight.detach().clone()
    filled(nets["net"], 7.0)
    assert torch.equal(ema.nets["net"].weight, before)
    ema.update(nets, LATE, 8)
    assert nets["net"].weight.unique().tolist() == [7.0]
