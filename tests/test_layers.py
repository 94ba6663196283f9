"""Layers shared by the families."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm

from dgm.nn.kernels.norm import Dropout, counter_dropout
from dgm.nn.layers import (
    Attention,
    DeferredBiasConv2d,
    Embedding,
    PointwiseConv2d,
    embed,
    group_norm,
    repeat_pixels,
    timestep_embedding,
    use_kernels,
)
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


@pytest.mark.parametrize("silu", [True, False])
def test_norm_act_is_the_formula(silu: bool):
    torch.manual_seed(0)
    layer = group_norm(8, silu).double()  # of two groups
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    x, added, scale, shift = (
        torch.randn(shape, dtype=torch.float64) for shape in ((3, 8, 4, 5), *[(3, 8)] * 3)
    )
    u = (x + added[:, :, None, None]).reshape(3, 2, -1)
    centered = u - u.mean(2, keepdim=True)
    x_hat = (centered / (centered.square().mean(2, keepdim=True) + 1e-6).sqrt()).reshape(x.shape)
    weight, bias = layer.weight[:, None, None], layer.bias[:, None, None]
    z = (weight * x_hat + bias) * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    expected = z * torch.sigmoid(z) if silu else z
    made = layer(x, added, (scale, shift))
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-12)  # rounding of float64


def test_dropout_keeps_the_mean():
    dropout = Dropout(0.25, Draws.of(0, torch.arange(64)), "dropout")
    made = counter_dropout(torch.ones(64, 8, 16, 16), dropout)
    assert made.unique().tolist() == pytest.approx([0, 4 / 3])
    # Of each element the variance is p / (1 - p); four standard errors.
    assert abs(float(made.mean()) - 1) < 4 * math.sqrt((1 / 3) / made.numel())


def test_dropout_does_not_depend_on_batch_or_memory_format():
    x = torch.randn(6, 3, 4, 5)
    draws = Draws.of(0, torch.arange(10, 16), 2)
    whole = counter_dropout(x, Dropout(0.5, draws, "dropout"))
    parts = [
        counter_dropout(
            x[i : i + 1], Dropout(0.5, Draws.of(0, torch.tensor([10 + i]), 2), "dropout")
        )
        for i in range(6)
    ]
    assert torch.equal(whole, torch.cat(parts))
    rows_last = x.to(memory_format=torch.channels_last)
    last = counter_dropout(rows_last, Dropout(0.5, draws, "dropout"))
    assert torch.equal(whole, last)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert not torch.equal(whole, counter_dropout(x, Dropout(0.5, draws, "another")))
    assert not torch.equal(whole, counter_dropout(x, Dropout(0.5, draws.at(3), "dropout")))


@pytest.mark.parametrize("num_heads", [1, 4])
def test_attention_is_softmax_of_scaled_products(num_heads: int):
    torch.manual_seed(0)
    layer = Attention(8, num_heads).double()
    nn.init.normal_(layer.out.weight)
    x = torch.randn(2, 8, 3, 5, dtype=torch.float64)
    flat = layer.qkv(layer.norm(x)).flatten(2)  # [B, 3 C, positions]
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


def test_upsampling_by_broadcasting_is_torchs():
    x = torch.randn(2, 6, 3, 5, dtype=torch.float64).to(memory_format=torch.channels_last)
    x.requires_grad_()
    weights = torch.randn(2, 6, 6, 10, dtype=torch.float64)
    expected = functional.interpolate(x, scale_factor=2, mode="nearest")
    made = repeat_pixels(x)
    assert torch.equal(made, expected)
    assert made.is_contiguous(memory_format=torch.channels_last)
    slopes = [torch.autograd.grad((y * weights).sum(), x)[0] for y in (made, expected)]
    torch.testing.assert_close(*slopes)


def test_upsampling_by_broadcasting_has_a_gradient_without_scattered_additions():
    """`interpolate` compiles to atomic additions on a GPU, whose order is not fixed."""

    def slope(x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(repeat_pixels(x), x, grad)[0]

    x, grad = torch.randn(1, 2, 4, 4, requires_grad=True), torch.randn(1, 2, 8, 8)
    graph = make_fx(slope)(x, grad).graph
    operations = {str(node.target) for node in graph.nodes if node.op == "call_function"}
    assert any("sum" in name for name in operations)
    scattered = "upsample", "index", "scatter"
    assert not any(word in name for name in operations for word in scattered)


@pytest.mark.parametrize("skip", [0, 3])
def test_pointwise_convolution_is_torchs(skip: int):
    layer = PointwiseConv2d(8, 5).double()
    x = torch.randn(2, 8, 4, 4, dtype=torch.float64).to(memory_format=torch.channels_last)
    x.requires_grad_()
    parts = x.split([8 - skip, skip], dim=1) if skip else (x,)
    made, expected = layer(*parts), functional.conv2d(x, layer.weight, layer.bias)
    torch.testing.assert_close(made, expected)
    assert made.is_contiguous(memory_format=torch.channels_last)
    given = (x, layer.weight, layer.bias)
    slopes = [torch.autograd.grad(y.sin().sum(), given) for y in (made, expected)]
    torch.testing.assert_close(*slopes)


@pytest.mark.parametrize("kernels", [False, True])
def test_a_deferred_bias_is_returned_for_the_next_layer(kernels: bool):
    layer = DeferredBiasConv2d(32, 32, 3, padding=1)
    if kernels:
        use_kernels(layer)
        assert layer.native
    x, added = torch.randn(2, 32, 8, 8), torch.randn(2, 32)
    expected = functional.conv2d(x, layer.weight, layer.bias, padding=1)
    y, bias = layer(x)
    torch.testing.assert_close(y + bias[:, :, None, None], expected, rtol=1e-4, atol=1e-4)
    y, more = layer(x, added)
    torch.testing.assert_close(more, added + layer.bias)
    assert set(layer.state_dict()) == {"weight", "bias"}


def test_kernels_are_chosen_by_device():
    """A net on the CPU gets the kernels for a CPU, also on a machine with a GPU."""
    net = nn.Sequential(group_norm(32), nn.Conv2d(32, 32, 3, padding=1))
    use_kernels(net, torch.device("cuda"))
    assert net[0].kernels == "triton"
    use_kernels(net)
    assert net[0].kernels == "native"


def rows(dtype: torch.dtype = torch.float64, count: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """Return labels (most repeated, one absent), weights and a gradient."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, count - 1, (64,), generator=generator)
    weight = torch.randn(count, 12, generator=generator, dtype=torch.float64).to(dtype)
    grad = torch.randn(64, 12, generator=generator, dtype=torch.float64).to(dtype)
    return labels, weight.requires_grad_(), grad


def gradient(function: Callable[[Tensor, Tensor], Tensor], *given: Tensor) -> Tensor:
    labels, weight, grad = given
    (found,) = torch.autograd.grad(function(labels, weight), weight, grad)
    return found


@pytest.mark.parametrize("shape", [(64,), (8, 8), (1,), (0,)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_embed_is_torchs_embedding_and_gradients_differ_by_rounding(
    dtype: torch.dtype, shape: tuple[int, ...]
):
    labels, weight, grad = rows(dtype)
    count = torch.Size(shape).numel()
    labels, grad = labels[:count].reshape(shape), grad[:count].reshape(*shape, 12)
    assert torch.equal(embed(labels, weight), nn.functional.embedding(labels, weight))
    exact = gradient(
        nn.functional.embedding, labels, weight.detach().double().requires_grad_(), grad.double()
    )
    found = gradient(embed, labels, weight, grad)
    assert found.dtype == dtype and found.shape == weight.shape
    # bf16 is rounded once, at the end: the sum itself is in fp32.
    error = float((found.double() - exact).abs().max())
    assert error <= {8: 1e-14, 4: 1e-5, 2: 2**-8 * float(exact.abs().max() + 1)}[dtype.itemsize]
    assert not found[weight.shape[0] - 1].any()  # the label that no image has


def test_derivatives_of_embed_are_those_of_finite_differences():
    labels, weight, _ = rows()
    labels = labels[:5]

    def squares(weight: Tensor) -> Tensor:
        return embed(labels, weight).square()

    assert torch.autograd.gradcheck(squares, (weight,))
    assert torch.autograd.gradgradcheck(squares, (weight,))


def test_forward_mode_and_vmap_of_embed_are_torchs():
    labels, weight, _ = rows()
    move = torch.randn(weight.shape, dtype=torch.float64)
    with_ours, with_torchs = (
        torch.func.jvp(lambda w, f=f: f(labels, w).sin(), (weight.detach(),), (move,))
        for f in (embed, nn.functional.embedding)
    )
    assert all(map(torch.equal, with_ours, with_torchs))
    found = torch.func.vmap(lambda label: embed(label, weight.detach()))(labels)
    assert torch.equal(found, weight.detach()[labels])


def test_autocast_does_not_round_the_gradient_of_embed():
    given = rows(torch.float32)
    plain = gradient(embed, *given)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gradient(embed, *given), plain)


def test_embedding_module_replaces_torchs():
    labels, weight, grad = rows(torch.float32)
    ours, theirs = Embedding(7, 12), nn.Embedding(7, 12)
    theirs.load_state_dict(ours.state_dict())
    assert isinstance(ours, nn.Embedding) and torch.equal(ours(labels), theirs(labels))
    named = functional_call(ours, {"weight": weight}, (labels,))
    assert torch.equal(named, weight[labels])
    normed = spectral_norm(ours)
    normed(labels).backward(grad)
    assert normed.parametrizations.weight.original.grad.abs().sum() > 0


def test_embed_is_compiled_in_one_graph():
    torch._dynamo.reset()
    fast = torch.compile(embed, backend="aot_eager", fullgraph=True)
    given = rows(torch.float32)
    assert torch.equal(gradient(fast, *given), gradient(embed, *given))
