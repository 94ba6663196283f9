"""Layers that families share."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from dgm.layers import Attention, group_norm, keyed_dropout, timestep_embedding, zeroed
from dgm.rng import Draws


@pytest.mark.parametrize(
    "channels, groups", [(1, 1), (6, 1), (8, 2), (48, 12), (50, 10), (64, 16), (128, 32), (512, 32)]
)
def test_group_norm_has_groups_of_at_least_four(channels: int, groups: int):
    assert group_norm(channels).num_groups == groups


def test_timestep_embedding_is_the_formula():
    t = torch.tensor([0, 1, 999])
    made = timestep_embedding(t, 8)
    assert made.dtype == torch.float32 and made.shape == (3, 8)
    for row, time in zip(made.tolist(), t.tolist(), strict=True):
        angles = [time * 10_000 ** (-k / 3) for k in range(4)]
        expected = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        # float32 holds an angle of 999 to 3e-5.
        assert row == pytest.approx(expected, abs=1e-4)


def test_timestep_embedding_tells_all_timesteps_apart():
    made = timestep_embedding(torch.arange(1000), 32)
    distances = torch.cdist(made, made) + 10 * torch.eye(1000)
    assert distances.min() > 0.1


def test_dropout_without_draws_does_nothing():
    x = torch.randn(2, 3, 4, 4)
    assert keyed_dropout(x, 0.5, None, "dropout") is x
    assert keyed_dropout(x, 0.0, Draws.of(0, torch.arange(2)), "dropout") is x


def test_dropout_keeps_the_mean():
    made = keyed_dropout(torch.ones(64, 8, 16, 16), 0.25, Draws.of(0, torch.arange(64)), "dropout")
    assert made.unique().tolist() == pytest.approx([0, 4 / 3])
    # Of each element the variance is p / (1 - p); four standard errors.
    assert abs(float(made.mean()) - 1) < 4 * math.sqrt((1 / 3) / made.numel())


def test_dropout_does_not_depend_on_batch_or_memory_format():
    x = torch.randn(6, 3, 4, 5)
    draws = Draws.of(0, torch.arange(10, 16), 2)
    whole = keyed_dropout(x, 0.5, draws, "dropout")
    parts = [
        keyed_dropout(x[i : i + 1], 0.5, Draws.of(0, torch.tensor([10 + i]), 2), "dropout")
        for i in range(6)
    ]
    assert torch.equal(whole, torch.cat(parts))
    last = keyed_dropout(x.to(memory_format=torch.channels_last), 0.5, draws, "dropout")
    assert torch.equal(whole, last)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert not torch.equal(whole, keyed_dropout(x, 0.5, draws, "another"))
    assert not torch.equal(whole, keyed_dropout(x, 0.5, draws.at(3), "dropout"))


def test_a_zeroed_layer_outputs_zero():
    assert not zeroed(nn.Conv2d(4, 6, 3))(torch.ones(1, 4, 5, 5)).any()


@pytest.mark.parametrize("num_heads", [1, 4])
def test_attention_is_softmax_of_scaled_products(num_heads: int):
    torch.manual_seed(0)
    layer = Attention(8, num_heads).double()
    nn.init.normal_(layer.out.weight)
    x = torch.randn(2, 8, 3, 5, dtype=torch.float64)
    flat = layer.qkv(layer.norm(x)).flatten(2)  # [B, 3 C, places]
    query, key, value = flat.chunk(3, dim=1)
    heads = []
    for q, k, v in zip(*(part.chunk(num_heads, 1) for part in (query, key, value)), strict=True):
        weights = torch.softmax(q.transpose(1, 2) @ k / math.sqrt(8 // num_heads), dim=-1)
        heads.append(v @ weights.transpose(1, 2))
    expected = x + layer.out(torch.cat(heads, 1).reshape(2, 8, 3, 5))
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)  # rounding of float64


def test_attention_starts_as_identity():
    x = torch.randn(2, 8, 4, 4)
    assert torch.equal(Attention(8)(x), x)


def test_attention_keeps_channels_last():
    x = torch.randn(2, 8, 4, 4).to(memory_format=torch.channels_last)
    made = Attention(8, 2).to(memory_format=torch.channels_last)(x)
    assert made.is_contiguous(memory_format=torch.channels_last)
