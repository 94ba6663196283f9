"""Derivatives of our 3x3 convolution: three orders in reverse mode, and forward mode.

Source: torch.nn.functional.conv2d in float64, whose derivatives of any order are torch's own.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from derivatives import (
    assert_derivatives_close,
    forward_mode,
    functional_gradient,
    gradient_penalty,
    hessian_vector_product,
    three_orders,
)
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional

from dgm.nn.kernels import native, winograd

# The filter F(4x4, 3x3) rounds like sums of numbers a few times larger, 1e-5 of the largest result
# in fp32 (dgm/nn/kernels/winograd.py); each order of derivatives passes through it once more.
TOLERANCE = 5e-5
BATCH, INPUTS, OUTPUTS, SIDE = 2, 32, 64, 8

Convolve = Callable[[Tensor, Tensor, Tensor], Tensor]


@pytest.fixture(autouse=True)
def compiled() -> None:
    assert native.library() is not None, "without a compiler nothing would be tested"


def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    layer = nn.Conv2d(INPUTS, OUTPUTS, 3, padding=1)
    del layer.weight, layer.bias
    layer.weight, layer.bias = weight, bias  # type: ignore[assignment]
    return winograd.convolve(layer, x)


def theirs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return functional.conv2d(x, weight, bias, padding=1)


def numbers(seed: int, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(seed)
    made = [
        torch.randn(BATCH, INPUTS, SIDE, SIDE, dtype=torch.float64),
        torch.randn(OUTPUTS, INPUTS, 3, 3, dtype=torch.float64) / (9 * INPUTS) ** 0.5,
        torch.randn(OUTPUTS, dtype=torch.float64),
    ]
    return [part.to(dtype) for part in made]


def same(derive: Callable[[Convolve, torch.dtype], list[Tensor]]) -> None:
    """Compare what `derive` makes of our convolution with what it makes of torch's in float64."""
    found, expected = derive(ours, torch.float32), derive(theirs, torch.float64)
    assert_derivatives_close(found, expected, TOLERANCE, floor=0.0)


def test_gradients_of_three_orders_are_those_of_a_direct_convolution():
    def derive(convolve: Convolve, dtype: torch.dtype) -> list[Tensor]:
        weights = numbers(1, dtype)[0].sum((1, 2, 3), keepdim=True)
        return three_orders(convolve, numbers(0, dtype), weights)

    same(derive)


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (1, 2), (0, 2)])
def test_gradient_penalty_where_some_inputs_have_no_gradient(frozen: tuple[int, ...]):
    same(lambda convolve, dtype: gradient_penalty(convolve, numbers(0, dtype), frozen))


def test_forward_mode_and_reverse_through_it_are_those_of_a_direct_convolution():
    same(lambda convolve, dtype: forward_mode(convolve, numbers(0, dtype), numbers(1, dtype)))


def test_hessian_times_vector_in_forward_over_reverse():
    same(
        lambda convolve, dtype: hessian_vector_product(
            convolve, numbers(0, dtype), numbers(1, dtype)
        )
    )


def test_functional_gradient_is_that_of_a_direct_convolution():
    same(lambda convolve, dtype: functional_gradient(convolve, numbers(0, dtype)))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_dual_numbers_have_the_tangent_of_a_direct_convolution(requires_grad: bool):
    def tangent(convolve: Convolve, dtype: torch.dtype) -> list[Tensor]:
        given = [part.requires_grad_(requires_grad) for part in numbers(0, dtype)]
        with forward_ad.dual_level():
            moved = [
                forward_ad.make_dual(*pair) for pair in zip(given, numbers(1, dtype), strict=True)
            ]
            return [part.detach() for part in forward_ad.unpack_dual(convolve(*moved))]

    same(tangent)


def test_operators_themselves_refuse_forward_mode():
    given = numbers(0, torch.float32)
    grad = torch.randn(BATCH, OUTPUTS, SIDE, SIDE)
    with forward_ad.dual_level():
        with pytest.raises(NotImplementedError, match="conv3x3 has no forward-mode derivative"):
            torch.ops.dgm.conv3x3(forward_ad.make_dual(given[0], given[0]), *given[1:])
        with pytest.raises(NotImplementedError, match="conv3x3_backward has no forward-mode"):
            torch.ops.dgm.conv3x3_backward(grad, *given[:2], True, True)


def test_without_images_the_gradient_of_the_weights_is_zero():
    x, weight, bias = numbers(0, torch.float32)
    held = torch.full((64, OUTPUTS, 3, 3, INPUTS), 7.0)  # memory that comes back full of sevens
    del held
    weight.requires_grad_()
    bias.requires_grad_()
    made = ours(x[:0].requires_grad_(), weight, bias)
    made.sum().backward()
    assert made.shape == (0, OUTPUTS, SIDE, SIDE)
    assert not weight.grad.any() and not bias.grad.any()


def test_compiled_it_is_one_graph_and_the_same():
    torch._dynamo.reset()
    layer = nn.Conv2d(INPUTS, OUTPUTS, 3, padding=1)
    winograd.use_in(layer)
    fast = torch.compile(layer, backend="aot_eager", fullgraph=True)
    given = [numbers(0, torch.float32)[0].requires_grad_(), *layer.parameters()]
    made, plain = fast(given[0]), layer(given[0])
    assert torch.equal(made, plain)
    slopes = (torch.autograd.grad(y.sin().sum(), given) for y in (made, plain))
    assert all(map(torch.equal, *slopes))
