"""The learning rate as a function of images seen, and the optimizer's settings."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dgm.common.errors import UserError
from dgm.training.ddp import clip
from dgm.training.optimizer import AdamW, OptimConfig, learning_rate, torch_adamw


@pytest.mark.parametrize(
    "config, images_seen, rates",
    [
        (OptimConfig(lr=0.4, warmup_images=100), (0, 10, 50, 100, 101, 5000),
         (0, 0.04, 0.2, 0.4, 0.4, 0.4)),
        (OptimConfig(lr=0.4, warmup_images=0), (1, 50), (0.4, 0.4)),
        # The last step may end after total_images, which is rounded up to whole steps.
        (OptimConfig(lr=0.4, warmup_images=100, decay="cosine"),
         (50, 100, 350, 600, 850, 1100, 1200),
         (0.2, *(0.2 * (1 + math.cos(math.pi * part)) for part in (0, 0.25, 0.5, 0.75)), 0, 0)),
    ],
    ids=["warm-up", "no warm-up", "cosine"],
)  # fmt: skip
def test_the_rate_is_a_function_of_images_seen(
    config: OptimConfig, images_seen: tuple[int, ...], rates: tuple[float, ...]
):
    found = [learning_rate(config, seen, total_images=1100) for seen in images_seen]
    assert found == pytest.approx(list(rates), abs=1e-15)


@given(st.integers(0, 3000), st.integers(1, 2000), st.integers(0, 2000))
def test_the_rate_stays_in_its_range(seen: int, total: int, warmup: int):
    for decay in ("constant", "cosine"):
        config = OptimConfig(lr=0.4, warmup_images=warmup, decay=decay)
        assert 0 <= learning_rate(config, seen, total) <= 0.4


def test_both_optimizers_name_an_invalid_setting():
    for make in (AdamW, torch_adamw):
        with pytest.raises(UserError, match=r"optim\.lr is 0\.0"):
            make(nn.Linear(2, 2).parameters(), OptimConfig(lr=0.0))


def learn(nets: list[nn.Module], step: int, missing: int | None) -> None:
    """Set the same gradients in two nets, none in the parameter `missing`."""
    torch.manual_seed(step)
    for number, (mine, other) in enumerate(
        zip(nets[0].parameters(), nets[1].parameters(), strict=True)
    ):
        mine.grad = None if number == missing else torch.randn_like(mine)
        other.grad = None if mine.grad is None else mine.grad.clone()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_have_the_same_bits_as_torchs(dtype: torch.dtype):
    config = OptimConfig(lr=0.1, betas=(0.8, 0.99), eps=1e-6, weight_decay=0.1)
    nets = [nn.Sequential(nn.Conv2d(8, 16, 3), nn.Conv2d(16, 8, 3)).to(dtype) for _ in range(2)]
    for net in nets:
        net.to(memory_format=torch.channels_last)
        net.load_state_dict(nets[0].state_dict())
    ours, theirs = AdamW(nets[0].parameters(), config), torch_adamw(nets[1].parameters(), config)
    # Some weights have no gradient in some steps, so that their counts of steps differ.
    for step, missing in enumerate([0, 0, None, 3, None, None]):
        learn(nets, step, missing)
        rate = 0.1 / (1 + step)
        theirs.param_groups[0]["lr"] = rate
        ours.step(rate)
        theirs.step()
        if step == 3:  # resume
            kept, ours = ours.state, AdamW(nets[0].parameters(), config)
            for weight, moments in kept.items():
                ours.load_moments(weight, {kind: value.clone() for kind, value in moments.items()})
    for mine, other in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(mine, other)
        for kind, value in theirs.state[other].items():
            assert torch.equal(ours.state[mine][kind], value), kind


def test_a_skipped_step_changes_neither_weights_nor_moments():
    net = nn.Linear(4, 4)
    made, before = AdamW(net.parameters(), OptimConfig()), net.weight.detach().clone()
    net.weight.grad = torch.full_like(net.weight, math.nan)
    made.step(0.1, torch.ones(()))
    assert torch.equal(net.weight, before)
    assert not made.state[net.weight]["exp_avg"].any()


def test_without_gradients_a_step_does_nothing():
    made = AdamW(nn.Linear(2, 2).parameters(), OptimConfig())
    made.step(0.1)
    assert not made.state


@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("limit", [0.0, 1e-3, 1.0])
def test_clipping_has_the_same_bits_as_torchs(size: float, limit: float):
    ours, theirs = nn.Linear(20, 20), nn.Linear(20, 20)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        mine.grad = torch.randn_like(mine) * size
        other.grad = mine.grad.clone()
    expected = nn.utils.clip_grad_norm_(theirs.parameters(), limit or float("inf"))
    assert torch.equal(clip(list(ours.parameters()), limit), expected)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert mine.grad is not None and other.grad is not None
        assert torch.equal(mine.grad, other.grad)
